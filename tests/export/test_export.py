"""Exported models: onnxruntime and OpenVINO against this library's own network and loop."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import Tensor, nn

import ddim.export.files
from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim.cli import main
from ddim.diffusion.sampling_config import SamplingConfig
from ddim.export import export_onnx, export_openvino
from ddim.export.graphs import StepGraph
from ddim.training.config import read_preset
from digits import TINY_MODEL
from helpers import error, randn, relative_error

LABELS = {"num_class_embeds": 4, "has_null_class": True, "class_names": ("cat", "dog", "frog")}


def make_pipe(scheduler: DDIMScheduler | None = None, **arguments: Any) -> DDIMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_MODEL | {"block_out_channels": [8, 8]} | arguments).eval()
    pipe = DDIMPipeline(unet, scheduler or DDIMScheduler(), engine="eager")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_onnx(path: Path, **inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])


def run_openvino(path: Path, **inputs: Tensor) -> Tensor:
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(next(iter(model({name: tensor.numpy() for name, tensor in inputs.items()}).values())))


def run_command(*arguments: str) -> str:
    """Run a command in this process; return its failure, empty for none."""
    sys.argv = ["ddim", *arguments]
    with pytest.raises(SystemExit) as stop:
        main()
    return str(stop.value.code or "")


# --- the step, as the loop of an exported file calls it


def scan(graph: StepGraph, latents: Tensor, *labels: Tensor) -> list[Tensor]:
    """Run the loop as the node Scan is defined; return the states after it: x, the history, the images."""
    states = [latents, *(torch.zeros_like(latents) for _ in graph.state_names[1:])]
    with torch.no_grad():
        for row in zip(*graph.tables(), strict=True):
            states = list(graph(*states, *row, *labels))
    return states


ROWS = [[900, 880, 0.1], [600, 610, 0.0, -0.2], [200, 190, -0.05, 0.1, 0.02]]
SIXTEEN_BITS = {"dtype": "uint16", "low": [100], "high": [3000]}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "epsilon": ({}, {}, {"num_inference_steps": 5}),
    "sample": ({"prediction_type": "sample"}, {}, {"num_inference_steps": 5}),
    "v": ({"prediction_type": "v_prediction"}, {}, {"num_inference_steps": 5}),
    "zero SNR": (
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {},
        {"num_inference_steps": 5},
    ),
    "not clipped": ({"clip_sample": False, "set_alpha_to_one": False}, {}, {"num_inference_steps": 4}),
    "thresholding": ({"thresholding": True, "sample_max_value": 1.5}, {}, {"num_inference_steps": 5}),
    "clipped epsilon": ({"clip_sample_range": 0.5}, {}, {"num_inference_steps": 5, "use_clipped_model_output": True}),
    "order 2": ({}, {}, {"num_inference_steps": 6, "order": 2}),
    "order 3": ({"timestep_spacing": "linspace"}, {}, {"num_inference_steps": 6, "order": 3}),
    "order 4": ({"solver_order": 4}, {}, {"num_inference_steps": 7}),
    "custom timesteps": ({}, {}, {"timesteps": [950, 700, 400, 150]}),
    "learned timesteps": ({"timesteps_by_steps": {"3": [980, 500, 100]}}, {}, {"num_inference_steps": 3}),
    "learned coefficients": ({"coefficients_by_steps": {"3": ROWS}}, {}, {"num_inference_steps": 3}),
    "learned variance": ({}, {"out_channels": 2}, {"num_inference_steps": 3}),
    "16 bits": ({}, {"pixel_format": SIXTEEN_BITS}, {"num_inference_steps": 3}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_scanned_step_is_the_loop(name: str) -> None:
    scheduler, network, settings = SETTINGS[name]
    pipe = make_pipe(DDIMScheduler(**scheduler), **network)
    latents = randn(3, 1, 8, 8)
    config = SamplingConfig(**settings)
    x, *_, images = scan(StepGraph(pipe.sampler, config), latents)
    assert relative_error(x, pipe.sampler.run(latents, pipe.sampler.plan(config))) < 1e-5
    assert relative_error(images, pipe(latents=latents, output_type="pt", **settings).images) < 1e-4


@pytest.mark.parametrize(
    ("scale", "negative"), [(1.0, None), (2.0, None), (2.0, "dog"), (0.0, None)], ids=["none", "null", "negative", "0"]
)
def test_scanned_step_is_guided(scale: float, negative: str | None) -> None:
    pipe = make_pipe(**LABELS)
    latents, labels = randn(3, 1, 8, 8), torch.tensor([2, 0, 1])
    expected = pipe(
        latents=latents,
        class_labels=labels,
        guidance_scale=scale,
        negative_labels=negative,
        num_inference_steps=4,
        output_type="pt",
    ).images
    graph = StepGraph(pipe.sampler, SamplingConfig(4), scale, negative)
    assert error(scan(graph, latents, labels)[-1], expected) < 1e-5


# --- files


@pytest.fixture(scope="module")
def guided() -> DDIMPipeline:
    """A model with much of what a loop may have."""
    blocks = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    scheduler = DDIMScheduler(thresholding=True, sample_max_value=1.5, prediction_type="v_prediction")
    return make_pipe(scheduler, **LABELS, **blocks)


@pytest.fixture(scope="module")
def loop(guided: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    guided.save_pretrained(folder / "model")
    path = folder / "loop.onnx"
    options = ["--loop", "--steps", "5", "--order", "3", "--guidance", "1.5", "--negative-label", "dog"]
    assert run_command("export", str(folder / "model"), *options, "--out", str(path)) == ""
    return path


@pytest.fixture(scope="module")
def halved() -> DDIMPipeline:
    """The network of a preset with a block per level, rounded to half precision."""
    torch.manual_seed(0)
    shallow = read_preset("digits-labels")["model"] | {"layers_per_block": 1}
    unet = UNet2DModel(**shallow, num_class_embeds=11, has_null_class=True)
    return DDIMPipeline(unet.eval(), DDIMScheduler()).to(torch.bfloat16)


@pytest.fixture(scope="module")
def network(halved: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(halved, tmp_path_factory.mktemp("network") / "network.onnx")


def convert(pipe: DDIMPipeline, path: Path) -> Path:
    """Export to OpenVINO, with a graph that was traced before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddim.export.files, "make_model", lambda *_: onnx.load(path))
        return export_openvino(pipe, path.with_suffix(".xml"))


@pytest.fixture(scope="module")
def converted_loop(guided: DDIMPipeline, loop: Path) -> Path:
    return convert(guided, loop)


@pytest.fixture(scope="module")
def converted_network(halved: DDIMPipeline, network: Path) -> Path:
    return convert(halved, network)


def test_runtimes_agree_with_the_loop(guided: DDIMPipeline, loop: Path, converted_loop: Path) -> None:
    for count in (1, 3):
        latents, labels = randn(count, 1, 8, 8), torch.arange(count)
        expected = guided(
            latents=latents,
            class_labels=labels,
            guidance_scale=1.5,
            negative_labels="dog",
            num_inference_steps=5,
            order=3,
            output_type="pt",
        ).images
        for images in (
            run_onnx(loop, latents=latents, class_labels=labels),
            run_openvino(converted_loop, latents=latents, class_labels=labels),
        ):
            assert images.dtype == torch.float32
            assert error(images, expected) < 1e-3


def test_runtimes_agree_with_the_network(halved: DDIMPipeline, network: Path, converted_network: Path) -> None:
    """They compute in float32 with the rounded weights."""
    unet = UNet2DModel.from_config(halved.unet.config).eval()
    unet.load_state_dict({name: tensor.float() for name, tensor in halved.unet.state_dict().items()})
    for count in (1, 3):
        sample, timestep, labels = randn(count, 1, 8, 8), torch.tensor([3, 999, 500])[:count], torch.arange(count)
        with torch.no_grad():
            expected = unet(sample, timestep, labels).sample
        inputs = {"sample": sample, "timestep": timestep, "class_labels": labels}
        assert error(run_onnx(network, **inputs), expected) < 1e-5
        assert error(run_openvino(converted_network, **inputs), expected) < 1e-5


def test_half_precision_takes_half_the_space(halved: DDIMPipeline, network: Path, converted_network: Path) -> None:
    weights = 2 * halved.unet.num_parameters()
    assert weights < network.stat().st_size < 1.8 * weights
    # OpenVINO writes equal constants once.
    assert 0.9 * weights < converted_network.with_suffix(".bin").stat().st_size < 1.1 * weights


def test_metadata_say_what_the_loop_is(guided: DDIMPipeline, loop: Path, converted_loop: Path) -> None:
    entries = onnxruntime.InferenceSession(loop).get_modelmeta().custom_metadata_map
    facts = {name: json.loads(text) for name, text in entries.items()}
    expected = {
        "graph": "loop",
        "sample_shape": [1, 8, 8],
        "weights_dtype": "float32",
        "prediction_type": "v_prediction",
        "classes": {"count": 3, "names": ["cat", "dog", "frog"], "null": 3},
        "timesteps": guided.scheduler.make_timesteps(5, order=3),
        "order": 3,
        "guidance": {"scale": 1.5, "negative_label": 1},
        "output_range": {"low": [0.0], "high": [1.0]},
    }
    assert facts.items() >= expected.items()
    assert facts["scheduler"]["thresholding"] is True
    model = openvino.Core().read_model(converted_loop)
    assert {name: model.get_rt_info(["ddim", name]).astype(str) for name in entries} == entries


def test_files_are_portable(loop: Path, network: Path) -> None:
    """One file, one opset, the operators of the standard, a free batch size, and nothing about this machine."""
    for path in (loop, network):
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(model, full_check=True)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
        assert {value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input} == {"N"}
        assert str(Path(ddim.__file__).parent).encode() not in path.read_bytes()
        assert [file.name for file in path.parent.iterdir() if file.suffix == ".data"] == []
    (scan,) = [node for node in onnx.load(loop).graph.node if node.op_type == "Scan"]
    for nodes, expected in ((scan.attribute[0].g.node, "Softmax"), (onnx.load(network).graph.node, "Resize")):
        assert {node.op_type for node in nodes} >= {"Conv", "InstanceNormalization", expected}
    metadata = {entry.key: json.loads(entry.value) for entry in onnx.load(network).metadata_props}
    assert metadata["graph"] == "network"
    assert np.allclose(metadata["alphas_cumprod"], DDIMScheduler().alphas_cumprod)


# --- what is refused, before any work


class NoModule:
    config = UNet2DModel(**TINY_MODEL).config

    def __call__(self, sample: Tensor, timestep: Tensor) -> Any:
        raise AssertionError


def refused(name: str) -> tuple[DDIMPipeline, dict[str, Any]]:
    pipe, settings = make_pipe(), {"loop": SamplingConfig(4)}
    if name == "eta":
        return pipe, {"loop": SamplingConfig(4, eta=0.5)}
    if name == "guidance of a network":
        return make_pipe(**LABELS), {"guidance_scale": 2.0}
    if name == "guidance without classes":
        return pipe, settings | {"guidance_scale": 2.0}
    if name == "guidance without a null class":
        return make_pipe(num_class_embeds=4), settings | {"guidance_scale": 2.0}
    if name == "other conditions":
        return make_pipe(class_embed_type="timestep"), settings
    if name == "no size":
        return make_pipe(sample_size=None), {}
    if name == "float64":
        return pipe.to(torch.float64), {}
    if name == "steps":
        return pipe, {"loop": SamplingConfig(1001)}
    if name == "scheduler":
        pipe.scheduler.step = lambda *_: None
        return pipe, settings
    assert name == "no module"
    return DDIMPipeline(NoModule(), DDIMScheduler()), {}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eta", "an exported loop requires eta=0 (deterministic sampling), got eta=0.5"),
        ("guidance of a network", "guidance is part of a loop: guidance_scale and negative_label require loop"),
        ("guidance without classes", "guidance requires a model with classes, or a guide"),
        ("guidance without a null class", "guidance requires negative_labels or a guide"),
        ("other conditions", "export supports class labels, got a network that takes other conditions"),
        ("no size", "export requires a model whose configuration has a sample_size"),
        ("float64", "export requires a network in float32, float16 or bfloat16, got torch.float64"),
        ("steps", "num_inference_steps must be "),
        ("scheduler", "scheduler must be a DDIMScheduler without methods of its own"),
        ("no module", "export requires a network that is a PyTorch module, got NoModule"),
    ],
)
def test_unsupported_models_and_settings_are_refused(name: str, message: str, tmp_path: Path) -> None:
    pipe, settings = refused(name)
    with pytest.raises((ValueError, TypeError)) as caught:
        export_onnx(pipe, tmp_path / "x.onnx", **settings)
    assert str(caught.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_the_limit_of_the_format_are_refused(tmp_path: Path) -> None:
    pipe = make_pipe()
    with torch.device("meta"):
        pipe.unet.extra = nn.Linear(2**15, 2**14 + 1)
    with pytest.raises(ValueError, match=r"holds at most 2 GiB, and the weights take 2\.0 GiB in float32"):
        export_onnx(pipe, tmp_path / "x.onnx")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.onnx", "--steps", "5"], "--steps has no effect without --loop; leave it out"),
        (["--out", "old.onnx"], "old.onnx exists; pass --overwrite to replace it"),
        (["--out", "old.xml"], "old.bin exists; pass --overwrite to replace it"),
        (["--out", "x.bin", "--format", "onnx"], "--out must end in .onnx, got 'x.bin'"),
        (["--out", "x", "--format", "trt"], "--format must be one of folder, onnx, or openvino, got 'trt'"),
        (["--out", "x", "--loop"], "--loop requires a file as --out, x.onnx or x.xml"),
        (["--out", "x"], "mnist is not a training run with checkpoints"),
        (["--out", "missing/x.onnx"], "missing is not a folder"),
        (["--out", "x.onnx", "--step", "3"], "mnist is not a training run with checkpoints"),
        (["--out", "x.onnx", "--loop", "--order", "5"], "--order must be 1 (DDIM) or 2, 3 or 4"),
        (["--out", "x.onnx", "--loop", "--negative-label", "3"], "--negative-label requires a --guidance other than 1"),
    ],
)
def test_command_refuses_in_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("old.onnx", "old.bin"):
        Path(name).write_text("precious")
    assert run_command("export", "mnist", *arguments).startswith(f"ddim: {message}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.bin", "old.onnx"]
