"""Scripts that reach into the network: hooks, blocks, layers that are replaced, memory formats, number types."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, prune

from dropin.library import Library, Observed, client, make_pipeline, make_unet, outcome, sample
from helpers import randn

DEEP: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 8, 16),
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
T = torch.tensor([3, 700])


@client()
def modules_by_name_and_class(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib, **DEEP)
    return {
        "classes": [(name, type(module).__name__) for name, module in unet.named_modules()],
        "children": [name for name, _ in unet.named_children()],
        "parameters": [(name, tuple(parameter.shape)) for name, parameter in unet.named_parameters()],
        "buffers": [name for name, _ in unet.named_buffers()],
        "state": list(unet.state_dict()),
    }


@client()
def every_module_hooked(lib: Library, folder: Path) -> Observed:
    unet, x, observed = make_unet(lib, **DEEP), randn(2, 3, 8, 8), {}
    for training in (True, False):
        for form, memory_format in FORMATS.items():
            for grad in (True, False):
                unet.train(training).to(memory_format=memory_format)
                calls: dict[str, list[int]] = {}
                handles = []
                for name, module in unet.named_modules():
                    counts = calls.setdefault(name, [0, 0, 0])

                    def count(*_: Any, counts: list[int] = counts, position: int = 0) -> None:
                        counts[position] += 1

                    handles.append(module.register_forward_pre_hook(count))
                    handles.append(module.register_forward_hook(lambda *a, c=count: c(position=1)))
                    if grad:
                        handles.append(module.register_full_backward_hook(lambda *a, c=count: c(position=2)))
                with torch.set_grad_enabled(grad):
                    out = unet(x.to(memory_format=memory_format), T).sample
                if grad:
                    out.square().mean().backward()
                for handle in handles:
                    handle.remove()
                observed[f"training {training}, {form}, gradients {grad}"] = {"calls": calls, "out": out}
    return observed


@client()
def arguments_that_hooks_see(lib: Library, folder: Path) -> Observed:
    unet, seen = make_unet(lib), {}

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            shapes = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in args]
            seen[name] = [shapes, sorted(kwargs), type(output).__name__]

        return record

    leaves = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.SiLU)
    for name, module in unet.named_modules():
        if isinstance(module, leaves) or name.split(".")[-1] in ("mid_block", "down_blocks") or "blocks" in name:
            module.register_forward_hook(hook(name), with_kwargs=True)
    with torch.no_grad():
        unet(randn(2, 3, 8, 8), T)
    return {"seen": dict(sorted(seen.items()))}


@client()
def features_taken_by_hooks(lib: Library, folder: Path) -> Observed:
    unet, features = make_unet(lib), {}
    for index, block in enumerate(unet.up_blocks):
        block.register_forward_hook(lambda m, i, o, index=index: features.__setitem__(f"up {index}", o.detach()))
    for index, block in enumerate(unet.down_blocks):
        block.register_forward_hook(lambda m, i, o, index=index: features.__setitem__(f"down {index}", o[0].detach()))
    unet.mid_block.attentions[0].to_q.register_forward_hook(lambda m, i, o: features.__setitem__("q", o.detach()))
    unet.mid_block.resnets[0].norm2.register_forward_hook(lambda m, i, o: features.__setitem__("norm2", o.detach()))
    unet.time_embedding.register_forward_hook(lambda m, i, o: features.__setitem__("time", o.detach()))
    with torch.no_grad():
        unet(randn(2, 3, 8, 8), T)
    images = sample(make_pipeline(lib, unet), num_inference_steps=2)
    return {"features": dict(sorted(features.items())), "images": images}


@client()
def blocks_called_directly(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib, **DEEP)
    with torch.no_grad():
        emb = unet.time_embedding(unet.time_proj(T))
        x = unet.conv_in(randn(2, 3, 8, 8))
        skips: tuple[Tensor, ...] = (x,)
        h = x
        for block in unet.down_blocks:
            h, more = block(hidden_states=h, temb=emb)
            skips += more
        middle = unet.mid_block(hidden_states=h, temb=emb)
        h = middle
        inputs = []
        for block in unet.up_blocks:
            own, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            inputs.append((h, own))
            h = block(hidden_states=h, res_hidden_states_tuple=own, temb=emb)
        out = unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))
        resnet = unet.mid_block.resnets[0]
        return {
            "embedding": emb,
            "middle": middle,
            "out": out,
            "positional": unet.mid_block(middle, emb),
            "attended": unet.down_blocks[1](x, emb)[0],
            "resnet": resnet(input_tensor=middle, temb=emb),
            "attention": unet.mid_block.attentions[0](hidden_states=middle),
            "attention with temb": unet.mid_block.attentions[0](middle, temb=emb),
            "sizes": unet.up_blocks[1].upsamplers[0](hidden_states=x),
            "output size": unet.up_blocks[1].upsamplers[0](x, output_size=(7, 5)),
            "upsample size": unet.up_blocks[1](*inputs[1], emb, upsample_size=(9, 9)),
            "downsampled": unet.down_blocks[0].downsamplers[0](hidden_states=x),
            "time": unet.time_embedding(sample=unet.time_proj(timesteps=T)),
        }


@client()
def attributes_of_layers(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib)
    resnet, attention = unet.mid_block.resnets[0], unet.mid_block.attentions[0]
    return {
        "resnet": [resnet.in_channels, resnet.out_channels, resnet.use_in_shortcut, resnet.output_scale_factor],
        "shortcut": [resnet.conv_shortcut is None, resnet.up, resnet.down],
        "activation": type(resnet.nonlinearity).__name__,
        "attention": [attention.heads, attention.scale, attention.residual_connection, attention.rescale_output_factor],
        "samplers": [unet.down_blocks[0].downsamplers[0].channels, unet.up_blocks[0].upsamplers[0].out_channels],
        "none": [unet.down_blocks[-1].downsamplers, unet.up_blocks[-1].upsamplers],
        "processor": type(attention.processor).__name__,
        "time": [unet.time_proj.num_channels, unet.time_embedding.linear_1.out_features],
    }


class Processor:
    """An attention processor of a client: attention that looks only at the first half of the positions."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        residual = hidden_states
        n, c, h, w = hidden_states.shape
        x = attn.group_norm(hidden_states.view(n, c, h * w)).transpose(1, 2)
        query, key, value = attn.to_q(x), attn.to_k(x)[:, : h * w // 2], attn.to_v(x)[:, : h * w // 2]
        query, key, value = map(attn.head_to_batch_dim, (query, key, value))
        x = attn.batch_to_head_dim(torch.bmm(attn.get_attention_scores(query, key), value))
        x = attn.to_out[1](attn.to_out[0](x)).transpose(-1, -2).reshape(n, c, h, w)
        return (x + residual) / attn.rescale_output_factor


@client()
def attention_processors(lib: Library, folder: Path) -> Observed:
    unet, x = make_unet(lib), randn(2, 3, 8, 8)
    with torch.no_grad():
        before = unet(x, T).sample
        for module in unet.modules():
            if type(module).__name__ == "Attention":
                module.set_processor(Processor())
        own = unet(x, T).sample
        for module in unet.modules():
            if type(module).__name__ == "Attention":
                module.set_processor(diffusers.models.attention_processor.AttnProcessor())
        classic = unet(x, T).sample
    return {"before": before, "own": own, "classic": classic}


class Quiet(nn.Module):
    """A layer that wraps another and has no attributes of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.layer(*args, **kwargs)
        return out * 0.5 if isinstance(out, Tensor) else out


class LayerScale(nn.Conv2d):
    """A subclass of a convolution with its own `forward`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


@client()
def layers_wrapped(lib: Library, folder: Path) -> Observed:
    unet, x, observed = make_unet(lib), randn(2, 3, 8, 8), {}
    kinds = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.SiLU, nn.Dropout)
    names = [name.rpartition(".") for name, module in unet.named_modules() if isinstance(module, kinds)]
    for child in sorted({name for _, _, name in names}):
        places = [unet.get_submodule(parent) for parent, _, name in names if name == child]
        for parent in places:
            setattr(parent, child, Quiet(getattr(parent, child)))
        with torch.no_grad():
            evaluated = unet.eval()(x, T).sample
        trained = unet.train()(x.to(memory_format=torch.channels_last), T).sample.detach()
        observed[child] = [len(places), evaluated, trained]
        for parent in places:
            setattr(parent, child, getattr(parent, child).layer)
    return observed


@client()
def layers_replaced_by_subclasses(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib)
    for name, module in list(unet.named_modules()):
        if type(module) is nn.Conv2d:
            parent, _, child = name.rpartition(".")
            args = (module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding)
            layer = LayerScale(*args)
            layer.load_state_dict(module.state_dict())
            setattr(unet.get_submodule(parent), child, layer)
    outputs = {}
    for form, memory_format in FORMATS.items():
        for training in (True, False):
            unet.train(training).to(memory_format=memory_format)
            with torch.set_grad_enabled(training):
                outputs[f"{form} {training}"] = unet(randn(2, 3, 8, 8), T).sample.detach()
    return outputs | {"images": sample(make_pipeline(lib, unet.eval()))}


@client()
def forward_of_layers_patched(lib: Library, folder: Path) -> Observed:
    unet, outputs = make_unet(lib), {}
    names = (
        "conv_in",
        "conv_norm_out",
        "time_embedding",
        "mid_block.attentions.0",
        "mid_block.attentions.0.to_v",
        "mid_block.resnets.0.conv2",
        "down_blocks.0.downsamplers.0",
        "down_blocks.0.downsamplers.0.conv",
        "up_blocks.0.upsamplers.0",
        "up_blocks.0.upsamplers.0.conv",
        "up_blocks.1.resnets.0.conv_shortcut",
    )
    for name in names:
        module = unet.get_submodule(name)
        forward = module.forward
        module.forward = lambda *args, f=forward, **kwargs: f(*args, **kwargs) * 0.7
        with torch.no_grad():
            outputs[name] = unet(randn(2, 3, 8, 8), T).sample
        outputs[f"{name} in training"] = unet.train()(randn(2, 3, 8, 8), T).sample.detach()
        unet.eval()
        del module.forward
    with torch.no_grad():
        return outputs | {"unpatched": unet(randn(2, 3, 8, 8), T).sample}


@client()
def forms_of_the_arguments(lib: Library, folder: Path) -> Observed:
    unet, x = make_unet(lib), randn(2, 3, 8, 8)
    wide = randn(2, 3, 8, 16)
    with torch.no_grad():
        return {
            "int": unet(x, 5).sample,
            "float": unet(x, torch.tensor(5.5)).sample,
            "0-d": unet(x, torch.tensor(5)).sample,
            "one": unet(x, torch.tensor([5])).sample,
            "per image": unet(sample=x, timestep=T).sample,
            "int32": unet(x, T.int()).sample,
            "tuple": unet(x, 5, return_dict=False),
            "positional": unet(x, 5, None, False),
            "strided": unet(wide[..., ::2], 5).sample,
            "channels_last": unet(x.to(memory_format=torch.channels_last), 5).sample,
            "expanded": unet(x[:1].expand(3, -1, -1, -1), 5).sample,
            "larger": unet(randn(1, 3, 16, 12), 5).sample,
            "timestep of another length": outcome(lambda: unet(x, torch.arange(3)), RuntimeError, ValueError)
            in ("RuntimeError", "ValueError"),
        }


@client()
def parameters_and_number_types(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib)
    unet.conv_in.requires_grad_(False)
    counts = [unet.num_parameters(), unet.num_parameters(only_trainable=True), unet.get_memory_footprint()]
    types = [str(unet.dtype), str(unet.device)]
    double = unet.double()(randn(2, 3, 8, 8).double(), T).sample.detach()
    types += [str(unet.dtype), str(unet.to(torch.bfloat16).dtype), str(unet.half().dtype), str(unet.float().dtype)]
    unet.to("meta")
    return {"counts": counts, "types": types, "double": double, "meta": str(unet.device)}


# Autocast rounds to 8 bits, and the operators that it rounds are not the same.
@client(tolerance=2e-2)
def autocast_on_a_cpu(lib: Library, folder: Path) -> Observed:
    unet = make_unet(lib).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = unet(randn(2, 3, 8, 8), T).sample
    out.float().square().mean().backward()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        evaluated = unet.eval()(randn(2, 3, 8, 8), T).sample
    return {"out": out, "gradient": unet.conv_out.weight.grad, "evaluated": evaluated, "double": str(out.dtype)}


@client()
def pruned_copied_and_pickled(lib: Library, folder: Path) -> Observed:
    unet, x = make_unet(lib), randn(2, 3, 8, 8)
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, "weight", amount=0.3)
    with torch.no_grad():
        pruned = unet(x, T).sample
        for module in unet.modules():
            if isinstance(module, nn.Conv2d):
                prune.remove(module, "weight")
        made_permanent = unet(x, T).sample
        torch.save(unet, folder / "unet.pt")
        loaded = torch.load(folder / "unet.pt", weights_only=False)
        copies = [loaded, copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))]
        outputs = [other(x, T).sample for other in copies]
    wrong = {name: value for name, value in unet.state_dict().items() if not name.startswith("conv_in")}
    return {
        "pruned": pruned,
        "permanent": made_permanent,
        "copies": outputs,
        "configs": [other.config.sample_size for other in copies],
        "vector": parameters_to_vector(unet.parameters()),
        "missing key": outcome(lambda: unet.load_state_dict(wrong), RuntimeError),
        "missing keys": unet.load_state_dict(wrong, strict=False).missing_keys,
    }


@client()
def switches_of_memory_and_attention(lib: Library, folder: Path) -> Observed:
    pipe = make_pipeline(lib)
    results = [pipe.enable_attention_slicing(), pipe.disable_attention_slicing(), pipe.maybe_free_model_hooks()]
    pipe.remove_all_hooks()
    return {
        "results": results,
        "images": sample(pipe),
        "xformers": outcome(pipe.enable_xformers_memory_efficient_attention, ModuleNotFoundError, ValueError),
        "model offload": outcome(pipe.enable_model_cpu_offload, RuntimeError, ValueError),
        "sequential offload": outcome(pipe.enable_sequential_cpu_offload, RuntimeError, ValueError),
        "afterwards": sample(pipe),
    }
