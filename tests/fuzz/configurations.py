"""Configurations of networks, schedulers, pipelines and training runs, with entries of every kind.

What is accepted can be saved and read again to an equal object, and where `diffusers` takes the same configuration,
both compute the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
import yaml
from hypothesis import strategies as st

from ddim.io.config import public_entries
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.training.config import TrainConfig, load_config
from ddim.unet import UNet2DModel
from fuzz.harness import Refused, attempt, empty, expect
from fuzz.models import TINY, save_pipeline
from fuzz.mutations import MUTATIONS, VALUES, Mutation, mutate

MAX_PARAMETERS = 300_000
UNET: dict[str, Any] = {
    "sample_size": st.sampled_from([8, 4, 16, [8, 8], [8, 16], None, 7]),
    "in_channels": st.integers(0, 4),
    "out_channels": st.integers(0, 4),
    "center_input_sample": st.booleans(),
    "time_embedding_type": st.sampled_from(["positional", "fourier", "learned"]),
    "time_embedding_dim": st.sampled_from([None, 8, 3, 0]),
    "freq_shift": st.integers(-1, 3),
    "flip_sin_to_cos": st.booleans(),
    "down_block_types": st.lists(
        st.sampled_from(["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "UNetResDownBlock2D"]), max_size=3
    ),
    "mid_block_type": st.sampled_from([None, "UNetMidBlock2D"]),
    "up_block_types": st.lists(st.sampled_from(["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"]), max_size=3),
    "block_out_channels": st.lists(st.sampled_from([2, 4, 6, 8, 16]), max_size=3),
    "layers_per_block": st.integers(0, 3),
    "mid_block_scale_factor": st.sampled_from([1, 0.5, 2.0, 1e-30]),
    "downsample_padding": st.integers(0, 2),
    "downsample_type": st.sampled_from(["conv", "resnet"]),
    "upsample_type": st.sampled_from(["conv", "resnet"]),
    "dropout": st.sampled_from([0.0, 0.5, 1.0]),
    "act_fn": st.sampled_from(["silu", "mish", "gelu", "relu", "swish", "SiLU"]),
    "attention_head_dim": st.sampled_from([None, 1, 2, 3, 4, 8]),
    "norm_num_groups": st.sampled_from([1, 2, 4, 3]),
    "attn_norm_num_groups": st.sampled_from([None, 1, 2, 4, 3]),
    "norm_eps": st.sampled_from([1e-5, 1e-6, 1, 1e30]),
    "resnet_time_scale_shift": st.sampled_from(["default", "scale_shift"]),
    "add_attention": st.booleans(),
    "class_embed_type": st.sampled_from([None, "timestep", "identity"]),
    "num_class_embeds": st.sampled_from([None, 0, 1, 5]),
    "num_train_timesteps": st.sampled_from([None, 1, 10]),
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": st.sampled_from([1, 2, 10, 1000, 4000]),
    "beta_start": st.sampled_from([0.0001, 0.5, 1e-12, 0.999]),
    "beta_end": st.sampled_from([0.02, 0.5, 0.999, 1e-12]),
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]),
    "trained_betas": st.lists(st.floats(0, 1) | st.floats(0.001, 0.3), max_size=12),
    "clip_sample": st.booleans(),
    "set_alpha_to_one": st.booleans(),
    "steps_offset": st.integers(0, 3),
    "prediction_type": st.sampled_from(["epsilon", "sample", "v_prediction"]),
    "thresholding": st.booleans(),
    "dynamic_thresholding_ratio": st.sampled_from([0.995, 0.5, 1]),
    "clip_sample_range": st.sampled_from([1.0, 0.5, 3]),
    "sample_max_value": st.sampled_from([1.0, 2, 0.5]),
    "timestep_spacing": st.sampled_from(["leading", "trailing", "linspace", "quad", "logsnr", "blend"]),
    "rescale_betas_zero_snr": st.booleans(),
    "_ddim": st.fixed_dictionaries(
        {}, optional={"solver_order": st.integers(0, 3), "timesteps_by_steps": st.just({"2": [9, 0]}) | VALUES}
    ),
}
INDEX: dict[str, Any] = {
    "_class_name": st.sampled_from(["DDIMPipeline", "DDPMPipeline", "StableDiffusionPipeline"]),
    "unet": st.sampled_from([["diffusers", "UNet2DModel"], ["ddim", "UNet2DModel"], ["diffusers", "AutoencoderKL"]]),
    "scheduler": st.sampled_from([["diffusers", "DDIMScheduler"], ["diffusers", "DDPMScheduler"], [None, None]]),
    "_diffusers_version": st.just("0.35.0"),
    "vae": st.sampled_from([[None, None], ["diffusers", "AutoencoderKL"]]),
}
CLASSES = st.lists(
    st.sampled_from(
        ["diffusers", "ddim", "os", "subprocess", "builtins", "system", "Popen", "eval", "UNet2DModel", "x"]
    ),
    max_size=3,
)
TRAINING: dict[str, Any] = {
    "data": st.sampled_from([{"source": "digits"}, {"source": "x/"}, {"source": "digits", "flip": True}]),
    "model": st.just(TINY) | st.dictionaries(st.sampled_from(sorted(UNET)), VALUES, max_size=2).map(lambda d: TINY | d),
    "init": st.sampled_from([None, "mnist"]),
    "scheduler": st.fixed_dictionaries({}, optional={name: SCHEDULER[name] | VALUES for name in list(SCHEDULER)[:9]}),
    "objective": st.fixed_dictionaries(
        {"weighting": st.sampled_from(["simple", "min_snr", "truncated_snr"])}, optional={"gamma": VALUES}
    ),
    "optim": st.dictionaries(
        st.sampled_from(["lr", "betas", "eps", "weight_decay", "warmup_steps", "decay", "decay_steps", "accumulate"]),
        VALUES | st.sampled_from(["1e-3", "2e-4", "cosine", "linear", [0.9, 0.99]]),
        max_size=2,
    ),
    "ema": st.dictionaries(st.sampled_from(["decay", "warmup"]), VALUES | st.just(0.99), max_size=1),
    "samples": st.dictionaries(st.sampled_from(["every", "count", "num_inference_steps"]), VALUES, max_size=1),
    "evaluate": st.dictionaries(st.sampled_from(["every", "count", "features"]), VALUES, max_size=2),
    "checkpoints": st.dictionaries(st.sampled_from(["every", "keep", "keep_every"]), VALUES, max_size=1),
    "batch_size": st.sampled_from([1, 8, 128]),
    "max_steps": st.sampled_from([1, 100]),
    "seed": st.sampled_from([0, 2**63 - 1]),
    "precision": st.sampled_from(["fp32", "bf16", "fp16"]),
}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
TEXTS = (
    *(BOMB, BOMB + "data: {source: digits}\nmodel: {sample_size: *j}", BOMB + "data: *j"),
    "data: {source: digits}\nmodel: {sample_size: 8, x:\n  "
    + BOMB.replace("\n", "\n   ").replace("a: ", "{a: ", 1)[:-1]
    + "}",
    "data: {source: digits}\nscheduler: {trained_betas: 2001-99-99}",
    "data: &a [*a]",
    "data: &a {source: *a}",
    "data: " + "[" * 5000,
    "data: !!python/object/apply:os.system ['true']",
    "data: {source: 2001-01-01}",
    "data: {source: digits}\nmodel: {sample_size: 2001-01-01 10:00:00, x: !!binary aGk=, y: !!set {a}, 3: 4}",
    "? [a, b]\n: c",
    "? {a: b}\n: c",
    "1: 2",
    "null: 3",
    "data: {source: digits, ~: 1}\nmodel: {~: 1}\noptim: {1: 2}",
    "--- a\n--- b",
    "\t",
    "x: \0",
    "x: " + "9" * 6000,
    "data: {source: digits}\nseed: " + "9" * 6000,
    "data: {source: digits}\nbatch_size: 1" + "0" * 400 + ".0",
    "<<: [1, 2]",
    "data: {source: digits}\nmodel: &m {sample_size: 8, in_channels: 1, out_channels: 1, x: *m}",
    "",
)
KINDS = {"unet": UNET, "scheduler": SCHEDULER, "index": INDEX, "training": TRAINING}


class Configuration(NamedTuple):
    """Entries of a configuration file.

    Attributes:
        kind: one of `KINDS`.
        entries: they replace those of a valid one.
        text: the whole file instead.
        mutations: damage to its bytes.
    """

    kind: str
    entries: dict[str, Any] = {}  # noqa: RUF012 - a default of a named tuple, never changed
    text: str | None = None
    mutations: list[Mutation] = []  # noqa: RUF012


@st.composite
def configurations(draw: Callable[[Any], Any]) -> Configuration:
    """Draw a configuration: valid entries, hostile ones, or damage to the file."""
    kind = draw(st.sampled_from(["unet", "unet", "scheduler", "scheduler", "index", "training"]))
    names = draw(st.lists(st.sampled_from(sorted(KINDS[kind])), max_size=4, unique=True))
    hostile = draw(st.sampled_from([(), (), names[:1], names[:1], names[:2]]))
    values = VALUES | CLASSES if kind == "index" else VALUES
    entries = {name: draw(values if name in hostile else KINDS[kind][name]) for name in names}
    if draw(st.integers(0, 9)) == 0:
        entries[draw(st.sampled_from(["x", "", "_class_name", "_use_default_values", "_ddim", "__init__", "self"]))] = (
            draw(VALUES)
        )
    mutations = draw(st.just([]) | st.just([]) | st.just([]) | MUTATIONS)
    text = draw(st.sampled_from(TEXTS)) if kind == "training" and draw(st.booleans()) else None
    return Configuration(kind, entries, text, mutations)


EXAMPLES = configurations()


def make_check(folder: Path) -> Callable[[Configuration], None]:
    """Return the check of a configuration."""
    template = save_pipeline(folder / "template")
    weights = template / "unet/diffusion_pytorch_model.safetensors"

    def check(configuration: Configuration) -> None:
        target = empty(folder / "configurations")
        kind, entries, mutations = configuration.kind, configuration.entries, configuration.mutations
        if kind == "training":
            check_training(target / "config.yaml", configuration)
            return
        base = (
            TINY
            if kind == "unet"
            else json.loads((template / "model_index.json").read_text())
            if kind == "index"
            else {}
        )
        path = target / {"unet": "config.json", "scheduler": "scheduler_config.json", "index": "model_index.json"}[kind]
        content = base | entries
        path.write_bytes(mutate(json.dumps(content).encode(), mutations))
        if kind == "index":
            for name in ("unet", "scheduler"):
                (target / name).symlink_to(template / name)
            check_index(target)
        elif kind == "scheduler":
            check_scheduler(target, None if mutations else entries)
        else:
            (target / weights.name).symlink_to(weights)
            check_unet(target, None if mutations else content)

    return check


def check_scheduler(folder: Path, entries: dict[str, Any] | None) -> None:
    """Load a scheduler, save it and load it again, and compare it with that of `diffusers`."""
    scheduler = attempt(DDIMScheduler.from_pretrained, folder, naming=(str(folder), *(entries or ())))
    scheduler.save_pretrained(folder / "again")
    again = DDIMScheduler.from_pretrained(folder / "again")
    expect(comparable(again.config) == comparable(scheduler.config), "the configuration changes when it is saved")
    expect(torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod), "alphas_cumprod change when they are saved")
    alphas = scheduler.alphas_cumprod.double()
    expect(bool(((alphas >= 0) & (alphas <= 1)).all()) and bool((alphas.diff() <= 0).all()), f"alphas {alphas}")
    steps = min(3, len(scheduler))
    own = attempt(scheduler.make_timesteps, steps)
    expect(len(own) == steps and list(own) == sorted(set(own), reverse=True), f"timesteps {own}")
    try:
        other = diffusers.DDIMScheduler.from_pretrained(folder)
        other.set_timesteps(steps)
        alphas = other.alphas_cumprod.double()
    except Exception:
        return
    expect(len(alphas) == len(scheduler), "another number of timesteps than diffusers")
    if bool(alphas.isnan().any()):  # products that underflow in its float32
        return
    # float32 products of diffusers, float64 here.
    expect(bool((alphas - scheduler.alphas_cumprod.double()).abs().max() < 1e-4), "alphas_cumprod are not diffusers'")
    # Trained betas of another number decide the number of timesteps here.
    if entries and not {"_ddim", "trained_betas"} & entries.keys():
        attempt(scheduler.set_timesteps, steps)
        expect(scheduler.timesteps.tolist() == other.timesteps.tolist(), f"{scheduler.timesteps} != {other.timesteps}")


def check_unet(folder: Path, entries: dict[str, Any] | None) -> None:
    """Load a network, or build it where the weights do not fit; save it, and compare it with that of `diffusers`."""
    try:
        attempt(UNet2DModel.from_pretrained, folder, naming=(str(folder), *(entries or ())))
    except Refused as refused:
        if "do not fit its configuration" not in str(refused):
            raise
    config = attempt(UNet2DModel.load_config, folder)
    with torch.device("meta"):
        size = attempt(UNet2DModel.from_config, config).num_parameters()
    if size > MAX_PARAMETERS:
        raise Refused("too large for this check")
    torch.manual_seed(0)
    network = attempt(UNet2DModel.from_config, config).eval()
    network.save_pretrained(folder / "again")
    again = UNet2DModel.from_pretrained(folder / "again")
    expect(comparable(again.config) == comparable(network.config), "the configuration changes when it is saved")
    state = network.state_dict()
    expect(all(torch.equal(state[name], tensor) for name, tensor in again.state_dict().items()), "weights change")
    settings = network.config
    height, width = (
        (settings.sample_size or 8,) * 2 if not isinstance(settings.sample_size, list | tuple) else settings.sample_size
    )
    if height * width > 4096:
        return
    x = torch.randn(2, settings.in_channels, height, width, generator=torch.Generator().manual_seed(1))
    timestep = torch.tensor([min(7, (settings.num_train_timesteps or 10) - 1)])
    labels = class_labels(network)
    with torch.no_grad():
        output = attempt(network, x, timestep, labels).sample
    expect(output.shape == (2, settings.out_channels, height, width), f"output of shape {tuple(output.shape)}")
    try:
        other = diffusers.UNet2DModel.from_config(config).eval()
        other.load_state_dict(state)
        with torch.no_grad():
            expected = other(x, timestep, labels).sample
    except Exception:
        return
    if bool(expected.isfinite().all()):
        error = float((output - expected).abs().max() / expected.abs().max().clamp(min=1))
        expect(error < 1e-3, f"differs from diffusers by {error:.1e}")


def class_labels(network: UNet2DModel) -> Any:
    """Return labels for a class-conditional network."""
    embedding = network.class_embedding
    if embedding is None:
        return None
    if isinstance(embedding, torch.nn.Identity):
        return torch.zeros(2, network.time_embedding.linear_2.out_features)
    return torch.zeros(2, dtype=torch.long)


def check_index(folder: Path) -> None:
    """Load a pipeline; what it names must not be run."""
    pipe = attempt(DDIMPipeline.from_pretrained, folder, naming=(str(folder), "unet", "scheduler"))
    pipe.save_pretrained(folder / "again")
    expect(isinstance(pipe.unet, torch.nn.Module), f"unet is {type(pipe.unet).__name__}")
    again = DDIMPipeline.from_pretrained(folder / "again")
    expect(type(again.scheduler) is type(pipe.scheduler), "another scheduler when it is saved")


def check_training(path: Path, configuration: Configuration) -> None:
    """Load a training configuration, and again what is written of it."""
    tree = {"data": {"source": "digits"}, "model": TINY} | configuration.entries
    text = yaml.safe_dump(tree) if configuration.text is None else configuration.text
    path.write_bytes(mutate(text.encode("utf-8", "surrogatepass"), configuration.mutations))
    config = attempt(load_config, None, path, naming=("configuration",))
    expect(isinstance(config, TrainConfig), f"a {type(config).__name__}")
    path.write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
    again = attempt(load_config, None, path)
    expect(again.model_dump_json() == config.model_dump_json(), "the configuration changes when it is saved")
    # What is accepted must be usable, or refused by the objects themselves in one sentence.
    attempt(DDIMScheduler, **config.scheduler)
    with torch.device("meta"):
        attempt(UNet2DModel, **config.model)


def comparable(config: Any) -> str:
    """Return the arguments of a configuration as text; arrays are lists in files."""
    return json.dumps(public_entries(config), sort_keys=True, default=lambda value: np.asarray(value).tolist())
