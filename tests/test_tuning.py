"""Learned timesteps, for a process whose limit is known in closed form."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ddim import DDIMInverseScheduler, DDIMPipeline, DDIMScheduler, UNet2DModel
from ddim.diffusion.equations import sigma_ddim
from ddim.diffusion.noise import noise_from_seeds
from ddim.diffusion.schedule import SPACINGS, check_timesteps_by_steps
from ddim.tuning import (
    REFERENCE_STEPS,
    ErrorEvaluator,
    TunedTimesteps,
    draw_timesteps,
    enough_steps,
    plot_timesteps,
    search,
    tune,
)
from digits import TINY_MODEL
from helpers import ALPHAS, randn, seeded
from programs import run_cli

MEAN, STD = 0.2, 0.25


class Gaussian(nn.Module):
    """The exact epsilon of pixels N(MEAN, STD^2); it counts evaluated images."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(sample_size=4, in_channels=1)
        self.config.items = lambda: {"sample_size": 4, "in_channels": 1}.items()
        self.nfe = 0
        self.max_nfe = math.inf

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def forward(self, x: Tensor, t: Tensor) -> Any:
        if self.nfe >= self.max_nfe:
            raise KeyboardInterrupt
        self.nfe += len(x)
        alpha = ALPHAS[int(t)]
        epsilon = math.sqrt(1 - alpha) * (x - math.sqrt(alpha) * MEAN) / (alpha * STD**2 + 1 - alpha)
        return SimpleNamespace(sample=epsilon)


def limit(x: Tensor) -> Tensor:
    """Map x at timestep 999 to the solution of the paper's ODE (14): an affine map that preserves quantiles."""
    alpha = ALPHAS[-1]
    return MEAN + STD * (x - math.sqrt(alpha) * MEAN) / math.sqrt(alpha * STD**2 + 1 - alpha)


@pytest.fixture(autouse=True)
def _separate_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def pipe() -> DDIMPipeline:
    pipe = DDIMPipeline(Gaussian(), DDIMScheduler(), engine="eager")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_mse(
    pipe: DDIMPipeline, timesteps: Sequence[int], order: int, seeds: Sequence[int] = range(100, 300)
) -> float:
    """Return the mean squared error of the pipeline's images relative to the closed form."""
    x = noise_from_seeds((len(seeds), 1, 4, 4), seeds, torch.device("cpu"))()
    images = pipe(latents=x, timesteps=timesteps, order=order, output_type="pt").images
    return float((images - (limit(x) / 2 + 0.5).clamp(0, 1)).square().mean())


class TestTune:
    @pytest.mark.parametrize(("order", "number"), [(1, 5), (2, 5), (2, 8)])
    def test_beats_every_spacing(self, pipe: DDIMPipeline, order: int, number: int) -> None:
        tuned = tune(pipe, number, order, num_latents=64, progress=False)
        assert len(tuned.timesteps) == number
        by_formula = {name: pipe.scheduler.make_timesteps(number, name) for name in SPACINGS}
        errors = {name: pipeline_mse(pipe, steps, order) for name, steps in by_formula.items()}
        assert pipeline_mse(pipe, tuned.timesteps, order) < 0.9 * min(errors.values())
        # The reported errors generalize to other latents.
        assert tuned.error == pytest.approx(pipeline_mse(pipe, tuned.timesteps, order), rel=0.25, abs=1e-6)
        for name, mse in tuned.classic.items():
            assert mse == pytest.approx(errors[name], rel=0.25, abs=1e-6)

    def test_reference_matches_closed_form(self, pipe: DDIMPipeline) -> None:
        evaluator = ErrorEvaluator(pipe, 2, 0.0, range(50), 64)
        x = noise_from_seeds((50, 1, 4, 4), range(50), torch.device("cpu"))()
        torch.testing.assert_close(evaluator._limit(0), limit(x).clamp(-1, 1), rtol=0, atol=2e-3)

    def test_deterministic_for_seed(self, pipe: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = tune(pipe, 4, num_latents=8, progress=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
        assert tune(pipe, 4, num_latents=8, progress=False) == first
        assert tune(pipe, 4, num_latents=8, seed=1000, progress=False) != first

    def test_resumes_after_interrupt(self, pipe: DDIMPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = tune(pipe, 6, num_latents=8, progress=False)
        cost = pipe.unet.nfe
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
        pipe.unet.nfe, pipe.unet.max_nfe = 0, cost // 2
        with pytest.raises(KeyboardInterrupt):
            tune(pipe, 6, num_latents=8, progress=False)
        pipe.unet.nfe, pipe.unet.max_nfe = 0, math.inf
        assert tune(pipe, 6, num_latents=8, progress=False) == expected
        # The reference and the predictions along the best timesteps are computed again.
        assert pipe.unet.nfe < 0.9 * cost
        pipe.unet.nfe = 0
        assert tune(pipe, 6, num_latents=8, progress=False) == expected
        assert pipe.unet.nfe == 0

    def test_cached_predictions_give_same_error(self, pipe: DDIMPipeline, tmp_path: Path) -> None:
        """Reusing predictions of the network does not change the error."""
        lists = [[900, 500, 200, 10], [900, 500, 100, 10], [900, 400, 100, 10], [950, 400, 100, 10]]
        evaluator = ErrorEvaluator(pipe, 2, 0.0, range(4), 64)
        for timesteps in lists:
            mse = evaluator.mse(timesteps)
            evaluator.set_best(timesteps)
            shutil.rmtree(tmp_path / "cache")
            assert mse == ErrorEvaluator(pipe, 2, 0.0, range(4), 64).mse(timesteps)

    def test_changed_model_invalidates_cache(self, pipe: DDIMPipeline) -> None:
        evaluator = ErrorEvaluator(pipe, 2, 0.0, range(4), 64)
        evaluator.mse([900, 0])
        with torch.no_grad():
            pipe.unet.weight.add_(1)
        assert ErrorEvaluator(pipe, 2, 0.0, range(4), 64)._errors == {}

    def test_damaged_cache_is_ignored(self, pipe: DDIMPipeline, tmp_path: Path) -> None:
        evaluator = ErrorEvaluator(pipe, 1, 0.0, range(4), 64)
        expected = evaluator.mse([900, 0])
        (entry,) = (tmp_path / "cache" / "ddim" / "tuning").iterdir()
        entry.write_text("{")
        assert ErrorEvaluator(pipe, 1, 0.0, range(4), 64).mse([900, 0]) == expected

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_inference_steps": 0}, "num_inference_steps must be an integer of at least 1, got 0"),
            ({"order": 5}, r"order must be 1 .* got 5"),
            ({"order": 2, "eta": 0.5}, "requires eta=0"),
            ({"order": 1, "eta": -1}, "eta must .* got -1"),
            ({"num_latents": 0}, "num_latents must be an integer from 1 to 10000, got 0"),
            ({"num_latents": 10**8}, "num_latents must be an integer from 1 to 10000, got 100000000"),
            ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ],
    )
    def test_invalid_input_raises(self, pipe: DDIMPipeline, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tune(pipe, **{"num_latents": 4, "progress": False} | arguments)


class TestNoise:
    def test_stochastic_sampling(self, pipe: DDIMPipeline) -> None:
        tuned = tune(pipe, 5, 1, 1.0, num_latents=16, progress=False)
        assert tuned.eta == 1
        assert tuned.error <= min(tuned.classic.values())

    def test_noise_increments_add_up(self, pipe: DDIMPipeline) -> None:
        """Two steps add the same noise to x / sqrt(alpha) as one step over both."""
        evaluator = ErrorEvaluator(pipe, 1, 0.7, range(3), 64)

        def total_noise(timesteps: list[int]) -> Tensor:
            steps = pipe.scheduler.make_steps([*timesteps, 0])[:-1]
            draw = evaluator._noise(steps, (3, 1, 4, 4), 0)
            total = torch.zeros(3, 1, 4, 4)
            for step in steps:
                fine = itertools.pairwise(range(step.timestep, step.prev_timestep - 1, -1))
                weights = [sigma_ddim(ALPHAS[a], ALPHAS[b], 0.7) / math.sqrt(ALPHAS[b]) for a, b in fine]
                total += math.sqrt(sum(weight**2 for weight in weights)) * draw()
            return total

        torch.testing.assert_close(total_noise([900, 300]), total_noise([900]), rtol=1e-4, atol=1e-4)

    def test_noise_is_standard_gaussian(self, pipe: DDIMPipeline) -> None:
        evaluator = ErrorEvaluator(pipe, 1, 1.0, range(2000), 2000)
        steps = pipe.scheduler.make_steps([500, 480], 1.0)
        noise = evaluator._noise(steps, (2000, 1, 4, 4), 0)()
        assert abs(float(noise.mean())) < 0.02
        assert abs(float(noise.std()) - 1) < 0.02


class TestSearch:
    def test_finds_minimum(self) -> None:
        target = [930, 610, 333, 90, 4]
        timesteps = search(
            lambda steps: sum((a - b) ** 2 for a, b in zip(steps, target, strict=True)), [999, 700, 500, 300, 0], 1000
        )
        assert max(abs(a - b) for a, b in zip(timesteps, target, strict=True)) <= 25

    @pytest.mark.parametrize("start", [[9], [9, 8, 7], [2, 1, 0], list(range(9, -1, -1)), [5, 1]])
    def test_lists_stay_valid(self, start: list[int]) -> None:
        """With a pseudo-random error, which accepts many proposals."""
        evaluated: list[tuple[int, ...]] = []

        def novelty(steps: Sequence[int]) -> float:
            assert all(a > b for a, b in itertools.pairwise(steps))
            assert max(steps) <= 9
            assert min(steps) >= 0
            assert len(steps) == len(start)
            evaluated.append(tuple(steps))
            return float(hash(tuple(steps)) % 1000)

        search(novelty, start, 10)


class TestEnough:
    @pytest.mark.parametrize(("order", "tolerance"), [(1, 1e-3), (2, 1e-3), (1, 2e-4)])
    def test_finds_smallest_number_of_steps(self, pipe: DDIMPipeline, order: int, tolerance: float) -> None:
        number, mse = enough_steps(pipe, tolerance, order)
        assert mse <= tolerance
        seeds = range(32)
        assert mse == pytest.approx(
            pipeline_mse(pipe, pipe.scheduler.make_timesteps(number, order=order), order, seeds), abs=2e-5
        )
        assert (
            pipeline_mse(pipe, pipe.scheduler.make_timesteps(number - 1, order=order), order, seeds) > tolerance - 2e-5
        )

    def test_invalid_input_raises(self, pipe: DDIMPipeline) -> None:
        with pytest.raises(ValueError, match="tolerance must be a number above 0 and below 1, got 0"):
            enough_steps(pipe, 0)
        with pytest.raises(ValueError, match="tolerance must be at least the error of 200 steps"):
            enough_steps(pipe, 1e-12, num_latents=2)


class TestScheduler:
    LISTS: ClassVar[dict[str, list[int]]] = {"3": [900, 300, 20], "5": [999, 700, 300, 100, 3]}

    def test_lists_apply_by_step_count(self) -> None:
        scheduler = DDIMScheduler(solver_order=2, timesteps_by_steps=self.LISTS)
        assert scheduler.make_timesteps(3) == self.LISTS["3"]
        assert scheduler.make_timesteps(np.int64(5)) == self.LISTS["5"]
        plain = DDIMScheduler(solver_order=2)
        assert scheduler.make_timesteps(4) == plain.make_timesteps(4)
        assert scheduler.make_timesteps(3, "leading") == [666, 333, 0]
        assert scheduler.make_timesteps(3, order=1) == [666, 333, 0]
        scheduler.set_timesteps(3)
        assert scheduler.timesteps.tolist() == self.LISTS["3"]
        # The returned list is a copy.
        scheduler.make_timesteps(3).append(0)
        assert scheduler.make_timesteps(3) == self.LISTS["3"]

    def test_order_2_replaces_leading_by_blend(self) -> None:
        blend = DDIMScheduler(timestep_spacing="blend").make_timesteps(7)
        assert DDIMScheduler(solver_order=2).make_timesteps(7) == blend
        assert DDIMScheduler().make_timesteps(7, order=2) == blend
        assert DDIMScheduler(timestep_spacing="linspace").make_timesteps(7, order=2) != blend

    def test_changed_order_drops_lists(self) -> None:
        config = DDIMScheduler(solver_order=2, timesteps_by_steps=self.LISTS).config
        assert DDIMScheduler.from_config(config, solver_order=2).make_timesteps(3) == self.LISTS["3"]
        assert DDIMScheduler.from_config(config, solver_order=1).make_timesteps(3) == [666, 333, 0]
        assert DDIMScheduler.from_config(config, solver_order=1, timesteps_by_steps=None).make_timesteps(3)[0] == 666

    def test_pipeline_uses_lists(self, pipe: DDIMPipeline) -> None:
        pipe.scheduler = DDIMScheduler(timesteps_by_steps=self.LISTS)
        images = pipe(seeds=[1], num_inference_steps=5, output_type="pt").images
        assert torch.equal(images, pipe(seeds=[1], timesteps=self.LISTS["5"], output_type="pt").images)
        assert pipe.latent_timesteps(5) == self.LISTS["5"]

    def test_inverse_scheduler_uses_lists(self) -> None:
        inverse = DDIMInverseScheduler(timesteps_by_steps=self.LISTS)
        inverse.set_timesteps(3)
        assert inverse.timesteps.tolist() == self.LISTS["3"][::-1]
        with pytest.raises(ValueError, match="solver_order must be 1, got 2: a step of order 2 or more depends"):
            DDIMInverseScheduler.from_config(DDIMScheduler(solver_order=2).config)

    def test_added_to_scheduler(self) -> None:
        tuned = TunedTimesteps([900, 300, 20], 0.1, {}, 2, 0.0)
        scheduler = tuned.added_to(DDIMScheduler(timesteps_by_steps={"1": [500]}))
        assert scheduler.timesteps_by_steps == {"3": [900, 300, 20]}
        assert scheduler.solver_order == 2
        extended = TunedTimesteps([800, 0], 0.1, {}, 2, 0.0).added_to(scheduler)
        assert extended.timesteps_by_steps == {"3": [900, 300, 20], "2": [800, 0]}

    @pytest.mark.parametrize(
        ("lists", "message"),
        [
            ({"3": [900, 300]}, r"timesteps_by_steps\['3'\] must list 3 timesteps, got 2"),
            ({"x": [900]}, r"timesteps_by_steps\['x'\] must list x timesteps, got 1"),
            ({"2": [300, 900]}, "strictly decreasing"),
            ({"1": [1000]}, "must be integers from 0 to 999, got 1000"),
            ({"1": "9"}, "must be a list of integers"),
            ({"0": []}, "must hold at least one timestep"),
        ],
    )
    def test_invalid_lists_raise(self, lists: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DDIMScheduler(timesteps_by_steps=lists)

    def test_requires_mapping(self) -> None:
        with pytest.raises(TypeError, match="must be a mapping"):
            DDIMScheduler(timesteps_by_steps=[1, 2])  # type: ignore[arg-type]
        assert check_timesteps_by_steps({2: (9, 0)}, 10) == {2: [9, 0]}


class TestDrawing:
    def test_text(self) -> None:
        text = draw_timesteps({"a": [999, 0], "longer": [250]}, 1000, width=33)
        assert text.splitlines() == [
            "a       |" + "·" * 31 + "|",
            "longer  " + "·" * 16 + "|" + "·" * 16,
            "t       0" + " " * 29 + "999",
        ]

    def test_plot(self, tmp_path: Path) -> None:
        plot_timesteps({"leading": [900, 500, 0], "learned": [999, 100, 3]}, tmp_path / "x.png")
        with Image.open(tmp_path / "x.png") as image:
            assert image.width > 300


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return run_cli(*arguments, env=os.environ, cwd=folder)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, make_unet: Callable[..., Any]) -> Iterator[tuple[Path, str]]:
    """Run `ddim tune`; return the folder of the tuned pipeline and the standard output."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        DDIMPipeline(make_unet(), DDIMScheduler()).save_pretrained(folder / "model")
        arguments = ("tune", "model", "--steps", "2,3", "--codes", "2", "--out", "tuned", "--plot", "grid.png")
        result = run(*arguments, folder=folder)
        assert result.returncode == 0, result.stderr
        yield folder, result.stdout


class TestCommand:
    def test_writes_tuned_pipeline(self, tuned: tuple[Path, str]) -> None:
        folder, printed = tuned
        config = json.loads((folder / "tuned/scheduler/scheduler_config.json").read_text())
        assert config["_ddim"]["solver_order"] == 2
        assert {key: len(value) for key, value in config["_ddim"]["timesteps_by_steps"].items()} == {"2": 2, "3": 3}
        for timesteps in config["_ddim"]["timesteps_by_steps"].values():
            assert f"timesteps {','.join(map(str, timesteps))}\n" in printed
        assert "leading" in printed
        assert printed.splitlines()[-1] == "tuned"
        assert (folder / "grid.png").is_file()

    def test_runs_in_ddim_and_diffusers(self, tuned: tuple[Path, str]) -> None:
        folder, _ = tuned
        pipe = DDIMPipeline.from_pretrained(folder / "tuned")
        pipe.set_progress_bar_config(disable=True)
        pipe(seeds=[0], num_inference_steps=3)
        assert pipe.scheduler.timesteps.tolist() == pipe.scheduler.timesteps_by_steps["3"]
        reference = diffusers.DDIMPipeline.from_pretrained(folder / "tuned")
        reference.set_progress_bar_config(disable=True)
        images = reference(num_inference_steps=3, output_type="np", generator=seeded(0)).images
        # diffusers ignores the order and the lists: it samples by plain DDIM.
        plain = pipe(num_inference_steps=3, order=1, output_type="np", generator=seeded(0)).images
        np.testing.assert_allclose(images, plain, atol=1 / 255)

    def test_latents_require_order_1(self, tuned: tuple[Path, str]) -> None:
        pipe = DDIMPipeline.from_pretrained(tuned[0] / "tuned")
        pipe.set_progress_bar_config(disable=True)
        latents = randn(2, 3, 16, 16, seed=0)
        images = pipe.decode(latents, 50, "pt").images
        encoding = pipe.encode(images * 2 - 1, 50, verify=False)
        decoded = pipe.decode(encoding, 50, "pt").images
        assert float((decoded - images).square().mean()) < 1e-4
        assert not torch.equal(pipe.decode(encoding.latents, 50, "pt", order=2).images, decoded)
        with pytest.raises(ValueError, match="order=2 cannot encode: a step of order 2 or more depends on"):
            pipe.encode(images, 50, order=2)
        with pytest.raises(ValueError, match=r"pass \.latents"):
            pipe.decode(encoding, 50, order=2)

    def test_existing_pipeline_is_not_overwritten(self, tuned: tuple[Path, str]) -> None:
        folder, _ = tuned
        result = run("tune", "model", "--steps", "2", "--codes", "2", "--out", "tuned", folder=folder)
        assert result.returncode == 1
        assert (
            result.stderr == "ddim: tuned holds a pipeline; give another --out, or give it as the MODEL to add to it\n"
        )

    def test_auto_step_count(self, tuned: tuple[Path, str]) -> None:
        folder, _ = tuned
        arguments = ("sample", "-m", "model", "-n", "1", "--steps", "auto")
        result = run(*arguments, "--tolerance", "0.01", "-o", "x.png", folder=folder)
        assert result.returncode == 0, result.stderr
        count, _, mse = result.stderr.splitlines()[0].partition(", mean squared error ")
        assert float(mse) <= 0.01
        steps = count.split()[0]
        assert run(*arguments[:-1], steps, "-o", "y.png", folder=folder).returncode == 0
        assert (folder / "x.png").read_bytes() == (folder / "y.png").read_bytes()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["sample", "--steps", "some"], "--steps must be an integer or auto, got 'some'"),
            (
                ["sample", "--steps", "auto", "--eta", "1"],
                "--steps auto requires the model's own timesteps and --eta 0",
            ),
            (["sample", "--steps", "10", "--tolerance", "0.1"], "--tolerance requires --steps auto"),
            (
                ["sample", "--steps", "auto", "--tolerance", "7"],
                "tolerance must be a number above 0 and below 1, got 7.0",
            ),
            (
                ["tune", "mnist", "--steps", "ten", "-o", "new"],
                "--steps must be integers separated by commas, such as 5,10,20, got 'ten'",
            ),
            (["tune", "mnist", "--plot", "x.jpg", "-o", "new"], "x.jpg"),
            (["tune", "nowhere", "-o", "new"], "nowhere"),
        ],
    )
    def test_invalid_input_raises(self, tmp_path: Path, arguments: list[str], message: str) -> None:
        result = run(*arguments, folder=tmp_path)
        assert result.returncode == 1
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert not (tmp_path / "new").exists()


def test_latents_take_labels_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_MODEL, num_class_embeds=4, has_null_class=True).eval()
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    evaluator = ErrorEvaluator(pipe, 1, 0.0, range(5), 2, {"class_labels": [0, 2], "guidance_scale": 2.0})
    scheduler = pipe.scheduler
    limit = scheduler.make_timesteps(min(REFERENCE_STEPS, len(scheduler)), "blend")

    def images(timesteps: list[int], order: int) -> torch.Tensor:
        settings = {"timesteps": timesteps, "order": order, "output_type": "pt"}
        return pipe(seeds=range(5), class_labels=[0, 2, 0, 2, 0], guidance_scale=2.0, **settings).images

    expected = (images([900, 0], 1) - images(list(limit), 2)).square().mean().item()
    assert evaluator.mse([900, 0]) == pytest.approx(expected, rel=1e-3)
    # Other labels are other errors, not those of the cache.
    other = ErrorEvaluator(pipe, 1, 0.0, range(5), 2, {"class_labels": [1, 2], "guidance_scale": 2.0})
    assert other.mse([900, 0]) != evaluator.mse([900, 0])
