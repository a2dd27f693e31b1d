"""Scripts that handle outputs: as dictionaries, tuples and attributes, as pytrees, in compilers and exporters."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_to_fp32, recursively_apply, send_to_device
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dropin.library import Library, Observed, client, make_pipeline, make_unet, outcome
from helpers import rand, randn, seeded


def outputs(lib: Library) -> dict[str, Any]:
    """Return an output of each kind."""
    scheduler = lib.DDIMScheduler()
    scheduler.set_timesteps(4)
    with torch.no_grad():
        prediction = make_unet(lib)(randn(2, 3, 8, 8), 7)
    images = make_pipeline(lib)(generator=seeded(0), num_inference_steps=2, output_type="np")
    return {"unet": prediction, "scheduler": scheduler.step(randn(1, 3, 4, 4), 250, rand(1, 3, 4, 4)), "images": images}


@client()
def outputs_as_dictionaries_tuples_and_attributes(lib: Library, folder: Path) -> Observed:
    observed: Observed = {}
    for name, out in outputs(lib).items():
        first = next(iter(out.keys()))
        observed[name] = {
            "class": type(out).__name__,
            "is": [isinstance(out, dict), isinstance(out, OrderedDict), isinstance(out, tuple), is_dataclass(out)],
            "fields": [field.name for field in fields(out)],
            "keys": list(out.keys()),
            "dict": dict(out),
            "items": [key for key, _ in out.items()],
            "iterated": list(out),
            "length": len(out),
            "true": bool(out),
            "contains": [first in out, "nothing" in out],
            "index": out[0],
            "last": out[-1],
            "slice": out[:1],
            "name": out[first],
            "attribute": getattr(out, first),
            "tuple": out.to_tuple(),
            "values": list(out.values()),
            "unpacked": (lambda **kwargs: sorted(kwargs))(**out),
            "get": out.get("nothing", 5),
            "wrong name": outcome(lambda o=out: o["nothing"], KeyError),
            "wrong index": outcome(lambda o=out: o[7], IndexError),
            "wrong attribute": outcome(lambda o=out: o.nothing, AttributeError),
        }
    return observed


@client()
def outputs_changed(lib: Library, folder: Path) -> Observed:
    observed: Observed = {}
    for name, out in outputs(lib).items():
        kind, first = type(out), next(iter(out.keys()))
        value = out[first]
        setattr(out, first, 1.0)
        by_attribute = [out[first], out[0], getattr(out, first)]
        out[first] = 2.0
        by_item = [out[first], out[0], getattr(out, first)]
        observed[name] = {
            "by attribute": by_attribute,
            "by item": by_item,
            "from a dictionary": kind({first: value})[first],
            "from a keyword": kind(**{first: value})[0],
            "by position": kind(value)[first],
            "without None": kind(value, None).to_tuple() if name == "scheduler" else None,
            "deleted": outcome(lambda o=out, f=first: o.__delitem__(f), Exception),
            "popped": outcome(lambda o=out, f=first: o.pop(f), Exception),
            "updated": outcome(lambda o=out: o.update({}), Exception),
            "equal": kind(3) == kind(3),
            "pickled": pickle.loads(pickle.dumps(kind(value)))[first],
            "copied": copy.deepcopy(kind(value))[first],
            "same class": type(pickle.loads(pickle.dumps(kind(value)))) is kind,
            "repr": kind.__name__ in repr(out),
        }
    return observed


def gathered(parts: list[Any]) -> Any:
    """Join outputs as `torch.nn.parallel.gather` does for `DataParallel`, on the CPU."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return type(first)({key: gathered([part[key] for part in parts]) for key in first})
    return type(first)(map(gathered, zip(*parts, strict=True)))


@client()
def outputs_of_data_parallel(lib: Library, folder: Path) -> Observed:
    unet, x = make_unet(lib), randn(4, 3, 8, 8)
    with torch.no_grad():
        joined = gathered([unet(half, 7) for half in x.chunk(2)])
        (as_tuple,) = gathered([unet(half, 7, return_dict=False) for half in x.chunk(2)])
        whole = unet(x, 7).sample
        alone = nn.DataParallel(unet)(x, 7).sample
    return {"joined": joined.sample, "keys": list(joined), "tuple": as_tuple, "whole": whole, "alone": alone}


@client()
def outputs_as_trees(lib: Library, folder: Path) -> Observed:
    observed: Observed = {}
    for name, out in outputs(lib).items():
        leaves, structure = pytree.tree_flatten(out)
        mapped = pytree.tree_map(lambda leaf: leaf * 2, out)
        rebuilt = pytree.tree_unflatten(leaves, structure)
        observed[name] = {
            "leaves": leaves,
            "mapped": dict(mapped),
            "classes": [type(tree) is type(out) for tree in (mapped, rebuilt)],
            "rebuilt": rebuilt.to_tuple(),
        }
    unet, scheduler, _ = outputs(lib).values()
    half = type(unet)(unet.sample.bfloat16())
    single = convert_to_fp32(half)
    doubled = recursively_apply(lambda tensor: tensor * 2, scheduler)
    moved = send_to_device(unet, "cpu")
    return observed | {
        "single": [single.sample, type(single) is type(unet)],
        "doubled": [doubled.prev_sample, doubled["pred_original_sample"], type(doubled) is type(scheduler)],
        "moved": [moved.sample, type(moved) is type(unet)],
    }


class Sample(nn.Module):
    """A network whose output is a tensor, for exporters that know nothing else."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.unet(sample, timestep, return_dict=False)[0]


@client()
def network_exported(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib)
    x, t = randn(2, 3, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        program = torch.export.export(unet, (x, t))
        exported = program.module()(x, t)
        torch.export.save(program, folder / "unet.pt2")
        loaded = torch.export.load(folder / "unet.pt2").module()(x, t)
        traced = torch.jit.trace(Sample(unet), (x, t), check_trace=False)(x, t)
        plain = unet(x, t).sample
    return {
        "class": type(exported).__name__,
        "exported": exported.sample,
        "loaded": loaded["sample"],
        "traced": traced,
        "plain": plain,
        "parameters": sorted(program.state_dict),
    }


@client()
def network_compiled(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib)
    x, t = randn(2, 3, 8, 8), torch.tensor([3, 700])
    torch.compiler.reset()
    # The eager backend: what is tested is that the graph has no break, not the code generated for it.
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    with torch.no_grad():
        out = compiled(x, t).sample
    torch.compiler.reset()
    return {"out": out, "keys": sorted(compiled.state_dict()), "channels": compiled.config.in_channels}


@client()
def network_as_a_function(lib: Library, folder: Path) -> Observed:
    # The attention of PyTorch on a CPU has no second derivative.
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    unet = make_unet(lib, **blocks)
    parameters = {name: 1.1 * parameter.detach() for name, parameter in unet.named_parameters()}
    x, t = randn(2, 3, 8, 8), torch.tensor([3, 700])

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(unet, parameters, (x, t)).sample.square().mean()

    gradients = torch.func.grad(loss)(parameters, x)
    x.requires_grad_()
    gradient = torch.autograd.grad(loss(parameters, x), x, create_graph=True)[0]
    second = torch.autograd.grad(gradient.square().sum(), x)[0]
    return {"gradients": gradients, "gradient": gradient, "second": second}
