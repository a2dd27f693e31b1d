"""Learned coefficients: on a process with a known score, and in the pipeline."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel, coefficients
from ddim.cli.common import with_spacing
from ddim.coefficients import Runs, learn, start_rows
from ddim.tuning import TunedTimesteps, enough_steps
from digits import TINY_MODEL
from helpers import randn
from programs import run_cli

SCHEDULER = DDIMScheduler(clip_sample=False)


class Config(dict[str, Any]):
    """A configuration with attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class MixtureNetwork(nn.Module):
    """The exact epsilon of pixels that are -0.5 or 0.6, each with a standard deviation of 0.1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.config = Config(sample_size=4, in_channels=1, out_channels=1, class_embed_type=None)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.evaluations = 0

    def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
        self.evaluations += len(x)
        alpha = float(SCHEDULER.alphas_cumprod_float64[int(t)])
        variance = alpha * 0.01 + 1 - alpha
        centers = math.sqrt(alpha) * torch.tensor([-0.5, 0.6])
        offsets = x[..., None] - centers
        shares = (-offsets.square() / (2 * variance)).softmax(-1)
        return SimpleNamespace(sample=math.sqrt(1 - alpha) * (shares * offsets).sum(-1) / variance)


@pytest.fixture(scope="module")
def pipe() -> DDIMPipeline:
    pipe = DDIMPipeline(MixtureNetwork(), SCHEDULER, engine="eager")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("steps", "ratio"), [(2, 0.8), (4, 0.5)])
def test_errors_fall(pipe: DDIMPipeline, steps: int, ratio: float) -> None:
    """On latents that the fit has not seen."""
    learned = learn(pipe, steps, num_latents=64, progress=False)
    assert learned.error < ratio * min(learned.others.values())
    assert len(learned.rows) == steps
    assert learned == learn(pipe, steps, num_latents=64, progress=False)


def test_evaluations_are_counted_and_few(pipe: DDIMPipeline) -> None:
    before = pipe.unet.evaluations
    learned = learn(pipe, 4, num_latents=16, progress=False)
    assert learned.evaluations == pipe.unet.evaluations - before
    assert learned.evaluations < 2500 * 16


def test_result_is_never_worse_than_what_it_is_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of random weights, on one latent: whatever is learned is of no use for others."""
    monkeypatch.setattr(coefficients, "MAX_EVALUATIONS_PER_LATENT", 100)
    torch.manual_seed(0)
    pipe = DDIMPipeline(UNet2DModel(**TINY_MODEL).eval(), DDIMScheduler(num_train_timesteps=50))
    learned = learn(pipe, 2, num_latents=1, progress=False)
    assert learned.error <= min(learned.others.values())
    assert "the model's own" in learned.others


def test_rows_of_formulas_sample_as_the_pipeline(pipe: DDIMPipeline) -> None:
    runs = Runs(pipe, [5, 6], 2, {})
    rows = dict(start_rows(pipe.scheduler, 6))
    for name, order in (("leading, order 1", 1), ("leading, order 2", 2)):
        timesteps = pipe.scheduler.make_timesteps(6, "leading")
        expected = pipe(seeds=[5, 6], timesteps=timesteps, order=order, output_type="pt").images
        images = runs.finish(runs.steps(rows[name]), 0, runs.start, [])
        torch.testing.assert_close((images / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-6)


def test_pipeline_and_scheduler_take_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = DDIMPipeline(UNet2DModel(**TINY_MODEL).eval(), DDIMScheduler(clip_sample=False))
    own.set_progress_bar_config(disable=True)
    rows = [[900, 880, 0.1], [500, 520, -0.2, 0.3], [100, 90, 0.05, 0.1, -0.4]]
    plain = own(seeds=[1, 2], num_inference_steps=3, output_type="pt").images
    own.scheduler = DDIMScheduler(clip_sample=False, coefficients_by_steps={"3": rows})
    own.save_pretrained(tmp_path)
    for pipe in (own, DDIMPipeline.from_pretrained(tmp_path)):
        pipe.set_progress_bar_config(disable=True)
        images = pipe(seeds=[1, 2], num_inference_steps=3, output_type="pt").images
        assert not torch.equal(images, plain)
        x = torch.cat([randn(1, 1, 8, 8, seed=seed) for seed in (1, 2)])
        pipe.scheduler.set_timesteps(3)
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                x = pipe.scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
        torch.testing.assert_close((x / 2 + 0.5).clamp(0, 1), images, rtol=0, atol=1e-4)
        # An order, timesteps and noise that are asked for are taken.
        for settings in ({"order": 1}, {"timesteps": [999, 666, 333]}, {"eta": 1.0}):
            other: dict[str, Any] = {"seeds": [1, 2], "num_inference_steps": 3, "output_type": "pt"} | settings
            scheduler = pipe.scheduler
            result = pipe(**other).images
            pipe.scheduler = DDIMScheduler(clip_sample=False)
            assert torch.equal(result, pipe(**other).images)
            pipe.scheduler = scheduler
    reference = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    reference.set_progress_bar_config(disable=True)
    assert reference(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


def test_classes_and_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coefficients, "MAX_EVALUATIONS_PER_LATENT", 50)
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_MODEL, num_class_embeds=3, has_null_class=True).eval()
    pipe = DDIMPipeline(unet, DDIMScheduler(num_train_timesteps=20))
    condition: dict[str, Any] = {"class_labels": [0, 1], "guidance_scale": 2.0}
    learned = learn(pipe, 2, num_latents=2, progress=False, **condition)
    assert learned.error <= min(learned.others.values())
    with pytest.raises(ValueError, match="class_labels must be"):
        learn(pipe, 2, num_latents=2, progress=False, class_labels=7)


def test_steps_are_found_with_learned_coefficients(pipe: DDIMPipeline) -> None:
    learned = learn(pipe, 4, num_latents=64, progress=False)
    tolerance = (learned.error + min(learned.others.values())) / 2
    tuned = DDIMPipeline(pipe.unet, learned.added_to(pipe.scheduler), engine="eager")
    assert enough_steps(tuned, tolerance, seed=500)[0] <= 4
    assert enough_steps(pipe, tolerance, seed=500)[0] > 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be an integer from 1 to 20, got 0"),
        ({"num_inference_steps": 21}, "num_inference_steps must be an integer from 1 to 20, got 21"),
        ({"num_latents": 0}, "num_latents must be an integer from 1 to 10000, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_invalid_arguments_raise(pipe: DDIMPipeline, arguments: dict[str, Any], message: str) -> None:
    before = pipe.unet.evaluations
    with pytest.raises(ValueError, match=message):
        learn(pipe, progress=False, **arguments)
    assert pipe.unet.evaluations == before


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run `ddim tune --coefficients`; return its folder and the standard output."""
    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(0)
    DDIMPipeline(UNet2DModel(**TINY_MODEL).eval(), DDIMScheduler(num_train_timesteps=20)).save_pretrained(folder / "m")
    arguments = ("tune", "m", "--steps", "2,3", "--coefficients", "--codes", "2", "--out", "t")
    done = run_cli(*arguments, env=os.environ, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_command_writes_a_pipeline(tuned: tuple[Path, str]) -> None:
    folder, printed = tuned
    config = json.loads((folder / "t/scheduler/scheduler_config.json").read_text())
    rows = config["_ddim"]["coefficients_by_steps"]
    assert {key: len(value) for key, value in rows.items()} == {"2": 2, "3": 3}
    assert printed.count("learned coefficients have") == 2
    assert f"t {rows['2'][0][0]:>4}, network at {rows['2'][0][1]:>4}, weights {rows['2'][0][2]:+.4f}" in printed
    assert printed.splitlines()[-1] == "t"


def test_command_line_samples_with_them(tuned: tuple[Path, str]) -> None:
    folder, _ = tuned
    options = ("sample", "-m", "t", "-n", "2", "--out")
    for out, further in (("learned", ()), ("plain", ("--order", "1"))):
        done = run_cli(*options, f"{out}.npz", "--steps", "3", *further, env=os.environ, cwd=folder)
        assert done.returncode == 0, done.stderr
    pipe = DDIMPipeline.from_pretrained(folder / "t")
    pipe.set_progress_bar_config(disable=True)
    images = pipe.sample_images(2, num_inference_steps=3)
    learned, plain = (np.load(folder / f"{name}.npz")["arr_0"][..., 0] for name in ("learned", "plain"))
    assert np.array_equal(learned, np.stack([np.asarray(image) for image in images]))
    assert not np.array_equal(learned, plain)


@pytest.mark.parametrize("option", [("--order", "2"), ("--eta", "0.5"), ("--plot", "x.png")])
def test_options_without_effect_are_refused(tmp_path: Path, option: tuple[str, str]) -> None:
    done = run_cli("tune", "mnist", "--coefficients", *option, "--out", "new", env=os.environ, cwd=tmp_path)
    assert done.returncode == 1
    assert f"{option[0]} has no effect beside --coefficients" in done.stderr


ROWS = [[900, 880, 0.1], [500, 520, -0.2, 0.3], [100, 90, 0.05, 0.1, -0.4]]


def test_edits_are_those_of_formulas() -> None:
    """Coefficients are of a whole run: an edit takes a part of one."""
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_MODEL).eval()
    edits = []
    for coefficients_by_steps in (None, {"3": ROWS}):
        own = DDIMPipeline(unet, DDIMScheduler(clip_sample=False, coefficients_by_steps=coefficients_by_steps))
        own.set_progress_bar_config(disable=True)
        edits.append(own.edit(torch.zeros(1, 1, 8, 8), 0.7, 3, "pt", seeds=[1]).images)
    assert torch.equal(*edits)


def test_what_is_asked_for_later_takes_their_place(pipe: DDIMPipeline) -> None:
    scheduler = DDIMScheduler(coefficients_by_steps={"3": ROWS, "1": ROWS[:1]})
    tuned = TunedTimesteps([900, 300, 0], 0.001, {}, order=2, eta=0.0).added_to(scheduler)
    assert tuned.make_learned_steps(3) is None
    assert tuned.make_learned_steps(1) == scheduler.make_learned_steps(1)
    assert DDIMScheduler.from_config(scheduler.config, solver_order=2).make_learned_steps(3) is None
    own = DDIMPipeline(pipe.unet, scheduler)
    assert with_spacing(own, "trailing").scheduler.make_learned_steps(3) is None
