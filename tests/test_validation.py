"""Messages about names that do not exist and values that are long, wherever there are some."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddim.devices import choose_device, choose_dtype
from ddim.evaluation.features import load_features
from ddim.evaluation.metrics import check_metrics
from ddim.io.image_files import check_output_path
from ddim.outputs import ImagePipelineOutput
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.training.config import load_config, read_preset
from ddim.unet import UNet2DModel

MISTYPED: dict[str, tuple[Callable[[], Any], str]] = {
    "argument of a network": (lambda: UNet2DModel(block_out_channel=(32,)), "block_out_channels"),
    "argument of a scheduler": (lambda: DDIMScheduler(clip_samples=False), "clip_sample"),
    "override": (lambda: UNet2DModel.from_config({}, layer_per_block=1), "layers_per_block"),
    "option of loading": (lambda: DDIMPipeline.from_pretrained("mnist", torch_dtyp="auto"), "torch_dtype"),
    "model": (lambda: DDIMPipeline.from_pretrained("mnits"), "mnist"),
    "block": (lambda: UNet2DModel(down_block_types=("DownBlok2D",) * 4), "DownBlock2D"),
    "activation": (lambda: UNet2DModel(act_fn="silo"), "silu"),
    "schedule": (lambda: DDIMScheduler(beta_schedule="linearr"), "linear"),
    "spacing": (lambda: DDIMScheduler(timestep_spacing="Trailng"), "trailing"),
    "prediction type": (lambda: DDIMScheduler(prediction_type="epsilom"), "epsilon"),
    "preset": (lambda: read_preset("cifar"), "cifar10"),
    "metric": (lambda: check_metrics(["recalll"], True), "recall"),
    "features": (lambda: load_features("pixel", (1, 8, 8)), "pixels"),
    "dtype": (lambda: choose_dtype("bfloat"), "bfloat16"),
    "field of a result": (lambda: ImagePipelineOutput({"image": []}), "images"),
}


@pytest.mark.parametrize("name", MISTYPED)
def test_nearest_name_is_suggested(name: str) -> None:
    call, expected = MISTYPED[name]
    with pytest.raises((ValueError, TypeError, AttributeError, FileNotFoundError), match=f"did you mean '{expected}'"):
        call()


def test_class_in_a_file(tmp_path: Path) -> None:
    DDIMPipeline.from_pretrained("mnist").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"unet": ["diffusers", "UNet2DModle"]}))
    with pytest.raises(ValueError, match=r"got 'UNet2DModle' \(did you mean 'UNet2DModel'\?\)"):
        DDIMPipeline.from_pretrained(tmp_path)


def test_ignored_entries(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        DDIMScheduler.from_config({"beta_strat": 0.1, "zzz": 1})
    assert caplog.messages == [
        "DDIMScheduler ignores these entries of a configuration: 'beta_strat' (did you mean 'beta_start'?), 'zzz'"
    ]


LONG = "x" * 10_000
CALLS_WITH_LONG_VALUES: dict[str, Callable[[], Any]] = {
    "model": lambda: DDIMPipeline.from_pretrained(LONG),
    "class label": lambda: UNet2DModel(class_embed_type=LONG),
    "unknown argument": lambda: DDIMScheduler(**{LONG: 1}),
    "unknown option": lambda: DDIMPipeline.from_pretrained("mnist", **{LONG: 1}),
    "spacing": lambda: DDIMScheduler(timestep_spacing=LONG),
    "type": lambda: DDIMScheduler(beta_start=LONG),
    "number": lambda: DDIMScheduler().make_timesteps(10**5000),
    "device": lambda: choose_device(LONG),
    "output": lambda: check_output_path(f"{LONG}.jpg"),
    "setting": lambda: load_config("mnist", settings=[LONG]),
    "value of a setting": lambda: load_config("mnist", settings=[f"seed={LONG}"]),
    "name of a setting": lambda: load_config("mnist", settings=[f"optim.{LONG}=1"]),
    "not YAML": lambda: load_config("mnist", settings=[f"seed=[{LONG}"]),
    "configuration file": lambda: load_config(config_file=Path(LONG)),
}


@pytest.mark.parametrize("name", CALLS_WITH_LONG_VALUES)
def test_long_values_are_shortened(name: str) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as caught:
        CALLS_WITH_LONG_VALUES[name]()
    assert len(str(caught.value)) < 1000
