"""Power-function averages against their definition as weighted sums; combined ones against ones that were tracked."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cli_batch import Commands
from ddim import DDIMPipeline
from ddim.training.averages import (
    AVERAGES,
    PowerAverages,
    RunAverages,
    find_checkpoint,
    list_snapshots,
    save_snapshot,
    snapshot_interval,
    snapshot_step,
)
from ddim.training.checkpoint import load_checkpoint
from ddim.training.config import TrainConfig
from ddim.training.power_average import Profile, combine, exponent, inner_products
from ddim.training.run import train
from digits import digits
from helpers import file_names, same_tensors, seeded

MakeConfig = Callable[..., TrainConfig]
LENGTHS = (0.05, 0.06, 0.07, 0.08, 0.09, 0.10)


def step_weights(sigma_rel: float, steps: int) -> np.ndarray:
    """The weights of steps 1 to `steps` in an average, by its definition."""
    edges = (np.arange(steps + 1) / steps) ** (exponent(sigma_rel) + 1)
    return np.diff(edges)


def relative(a: Tensor, b: Tensor) -> float:
    """The norm of the difference, relative to that of `b`."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


# --- mathematics


@pytest.mark.parametrize("sigma_rel", [0.005, 0.05, 0.1, 0.2, 0.28])
def test_length_is_the_standard_deviation_of_the_profile(sigma_rel: float) -> None:
    """By the moments of 4 million steps."""
    steps = 4_000_000
    weights = step_weights(sigma_rel, steps)
    time = (np.arange(steps) + 0.5) / steps
    assert weights.sum() == pytest.approx(1)
    assert math.sqrt(weights @ time**2 - (weights @ time) ** 2) == pytest.approx(sigma_rel, rel=1e-4)


def test_inner_products_match_numerical_integration() -> None:
    profiles = [Profile(step, sigma_rel) for step in (30, 70, 100) for sigma_rel in (0.05, 0.2)]
    tau = (np.arange(1_000_000) + 0.5) / 1e4

    def density(profile: Profile) -> np.ndarray:
        gamma = exponent(profile.sigma_rel)
        return np.where(tau < profile.step, (gamma + 1) * (tau / profile.step) ** gamma / profile.step, 0)

    densities = np.stack([density(profile) for profile in profiles])
    expected = densities @ densities.T / 1e4
    np.testing.assert_allclose(inner_products(profiles, profiles), expected, rtol=1e-4)


def test_combination_is_the_best_of_those_that_sum_to_one() -> None:
    stored = [Profile(step, sigma_rel) for step in range(8, 65, 8) for sigma_rel in (0.05, 0.1)]
    target = Profile(64, 0.07)
    best = combine(stored, target)
    assert best.coefficients.sum() == pytest.approx(1)
    square = inner_products([target], [target])[0, 0]

    def residual(x: np.ndarray) -> float:
        linear = inner_products(stored, [target])[:, 0]
        return math.sqrt(max(0.0, square - 2 * x @ linear + x @ inner_products(stored, stored) @ x) / square)

    assert best.residual == pytest.approx(residual(best.coefficients), abs=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(20):
        change = rng.standard_normal(len(stored)) * 1e-2
        assert residual(best.coefficients + change - change.mean()) > best.residual
    # One that is stored is met exactly.
    assert combine(stored, stored[-1]).residual < 1e-6
    with pytest.raises(ValueError, match="at least one profile"):
        combine([], target)


@pytest.mark.parametrize("value", [0, 0.004, 0.29, -0.1, math.nan])
def test_lengths_out_of_range_raise(value: float) -> None:
    with pytest.raises(ValueError, match=r"sigma_rel must be a number from 0\.005 to 0\.28"):
        exponent(value)


# --- tracking and snapshots


def test_interval_is_the_smallest_that_bounds_the_number() -> None:
    for maximum in (1, 2, 3, 16):
        for step in range(1, 300):
            interval = next(2**k for k in itertools.count() if step // 2**k <= maximum)
            assert snapshot_interval(step, maximum) == interval


def test_reconstruction_after_2000_steps(tmp_path: Path) -> None:
    """Of weights that move to a target with noise, as weights do that are trained; at most 16 snapshots in float16."""
    steps, layer = 2000, nn.Linear(40, 25, bias=False).requires_grad_(False)
    tracked, direct = PowerAverages(layer, (0.05, 0.10)), PowerAverages(layer, LENGTHS)
    generator, target = seeded(1), torch.randn(25, 40, generator=seeded(2))
    definition = torch.zeros(25, 40, dtype=torch.float64)
    layer.weight.zero_()
    for step, weight in enumerate(step_weights(0.07, steps), 1):
        noise = torch.randn(25, 40, generator=generator)
        layer.weight.copy_(layer.weight + 0.005 * (target - layer.weight) + 0.02 * noise)
        definition += weight * layer.weight.double()
        tracked.update(step)
        direct.update(step)
        if step % snapshot_interval(step, 16) == 0:
            save_snapshot(tmp_path, step, tracked.state_dict(), 16)
    assert relative(direct.averages[0.07]["weight"], definition) < 1e-6

    stored = {snapshot_step(path): load_file(path) for path in list_snapshots(tmp_path)}
    assert list(stored) == list(range(128, steps, 128))
    assert all(tensor.dtype == torch.float16 for tensors in stored.values() for tensor in tensors.values())
    stored[steps] = tracked.state_dict()
    profiles = [Profile(step, sigma_rel) for step in stored for sigma_rel in (0.05, 0.10)]
    for length in LENGTHS:
        coefficients = combine(profiles, Profile(steps, length)).coefficients
        combined = sum(
            coefficient * stored[step][f"{sigma_rel:g}/weight"].double()
            for coefficient, (step, sigma_rel) in zip(coefficients, profiles, strict=True)
        )
        # Ten times nearer than is asked for.
        assert relative(combined, direct.averages[length]["weight"]) < 3e-4


def test_saved_averages_of_another_run_raise() -> None:
    layer = nn.Linear(2, 2)
    averages = PowerAverages(layer, [0.1])
    for other in (PowerAverages(layer, [0.2]), PowerAverages(nn.Linear(3, 2), [0.1])):
        with pytest.raises(ValueError, match=r"of other lengths \(ema\.sigma_rels\) or another model"):
            averages.load_state_dict(other.state_dict())


# --- runs


@pytest.fixture(scope="module")
def trained(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 80 steps whose own average is one of a length between those that snapshots are kept of; read-only."""
    out = tmp_path_factory.mktemp("averages") / "run"
    config = make_config(
        max_steps=80,
        ema={"sigma_rel": 0.07},
        checkpoints={"every": 40, "keep_every": 40},
        data={"horizontal_flip": True},
    )
    train(config, out, "cpu")
    return out


@pytest.mark.parametrize("step", [40, 80])
def test_length_between_the_tracked_ones(trained: Path, step: int) -> None:
    expected = load_checkpoint(find_checkpoint(trained, step)).tensors
    result = RunAverages(trained, step).reconstruct(0.07)
    weights = result.pipe.unet.state_dict()
    assert relative(flat(weights), flat(expected["ema"])) < 1e-3
    assert relative(flat(weights), flat(expected["model"])) > 3e-3
    assert (result.step, result.snapshots) == (step, step // 8)
    assert result.residual < 0.05


def test_tracked_lengths_are_exact(trained: Path) -> None:
    averages = RunAverages(trained / "checkpoints" / "step-00000080")
    stored = load_checkpoint(averages.checkpoint).tensors[AVERAGES]
    for length in averages.sigma_rels:
        weights = averages.reconstruct(length).pipe.unet.state_dict()
        assert all(torch.allclose(tensor, stored[f"{length:g}/{name}"], atol=1e-7) for name, tensor in weights.items())


def test_snapshots_are_bounded(trained: Path) -> None:
    names = [f"step-{step:08d}.safetensors" for step in range(8, 81, 8)]
    assert file_names(trained / AVERAGES) == names


def test_resumed_run_has_the_same_averages(trained: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    """In the same folder, after snapshots beyond the checkpoint were thinned, and in another one."""
    config = make_config(
        max_steps=80,
        ema={"sigma_rel": 0.07},
        checkpoints={"every": 40, "keep_every": 40},
        data={"horizontal_flip": True},
    )
    same = shutil.copytree(trained, tmp_path / "same")
    checkpoint = same / "checkpoints" / "step-00000040"
    (same / AVERAGES / "step-00000088.safetensors").write_bytes(b"of a step that is taken anew")
    train(config, same, "cpu", resume=checkpoint)
    train(config, tmp_path / "other", "cpu", resume=checkpoint)
    for out in (same, tmp_path / "other"):
        for folder in (AVERAGES, "checkpoints/step-00000080"):
            assert file_names(out / folder) == file_names(trained / folder)
        for path in [*list_snapshots(trained / AVERAGES), find_checkpoint(trained) / "averages.safetensors"]:
            assert (out / path.relative_to(trained)).read_bytes() == path.read_bytes()


def test_checkpoints_without_averages_resume(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of earlier versions; nothing is reconstructed from them."""
    train(make_config(max_steps=2, ema={"sigma_rels": []}), tmp_path, "cpu")
    assert not (tmp_path / AVERAGES).exists()
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("    sigma_rels: []\n", ""))
    final = train(make_config(max_steps=4), tmp_path, "cpu")
    assert "the checkpoint has no averages for `ddim ema`; this run does not track them" in caplog.messages
    assert DDIMPipeline.from_pretrained(final).unet.num_parameters()
    with pytest.raises(ValueError, match=r"has no averages to combine: its run was trained with ema\.sigma_rels=\[\]"):
        RunAverages(tmp_path)


def test_damaged_snapshots_and_missing_checkpoints_raise(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    path = list_snapshots(run / AVERAGES)[3]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"step-00000032\.safetensors is damaged: its tensors are not those"):
        RunAverages(run).reconstruct(0.08)
    save_file({"0.1/w": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"step-00000032\.safetensors is not of the run of"):
        RunAverages(run).reconstruct(0.08)
    with pytest.raises(ValueError, match="step must be one of 40 or 80, got 60"):
        RunAverages(run, 60)
    with pytest.raises(FileNotFoundError, match="is not a training run with checkpoints"):
        RunAverages(tmp_path)
    with (run / "checkpoints" / "step-00000080" / "averages.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="its files do not match SHA256SUMS"):
        RunAverages(run)


# --- the command


@pytest.fixture(scope="module")
def commands(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    folder = tmp_path_factory.mktemp("ema")
    # Larger than the model's images, to which they are fitted.
    np.savez(folder / "reference.npz", np.kron(digits(20), np.ones((2, 2), np.uint8)))
    shutil.copytree(trained, folder / "run")
    measured = ["--metric", "precision", "--reference", "reference.npz", "-n", "8", "--steps", "2"]
    curve = ["--curve", "c.png", "--curve", "c.json", "--curve", "c.csv", "--curve", "c.md"]
    table = {
        "one": ["ema", "run", "--sigma-rel", "0.08", "--out", "one"],
        "early": ["ema", "run", "--sigma-rel", "0.25", "--step", "40", "--out", "early"],
        "search": ["ema", "run", "--sigma-rel", "0.05..0.2", *measured, *curve, "--out", "best"],
        "again": ["ema", "run", "--sigma-rel", "0.08", "--out", "one"],
        "several": ["ema", "run", "--sigma-rel", "0.05,0.1", "--out", "new"],
        "length": ["ema", "run", "--sigma-rel", "0.5", "--out", "new"],
        "text": ["ema", "run", "--sigma-rel", "0.2..0.1", "--out", "new"],
        "ignored": ["ema", "run", "--sigma-rel", "0.1", "-n", "8", "--out", "new"],
        "metric": ["ema", "run", "--sigma-rel", "0.1", "--metric", "fod", "--out", "new"],
        "reference": ["ema", "run", "--sigma-rel", "0.1", "--metric", "fid", "--out", "new"],
        "curve": ["ema", "run", "--sigma-rel", "0.1", *measured, "--curve", "c.txt", "--out", "new"],
        "step": ["ema", "run", "--sigma-rel", "0.1", "--step", "41", "--out", "new"],
        "model": ["ema", "mnist", "--sigma-rel", "0.1", "--out", "new"],
        "into": ["ema", "run", "--sigma-rel", "0.1", "--out", "run"],
    }
    with Commands(folder, table, {"again": ["one"]}) as results:
        yield results


def test_command_writes_a_model(commands: Commands, trained: Path) -> None:
    path = commands.output("one")
    pipe = DDIMPipeline.from_pretrained(path)
    assert same_tensors(pipe.unet.state_dict(), RunAverages(trained).reconstruct(0.08).pipe.unet.state_dict())
    assert file_names(path) == ["model_index.json", "scheduler", "unet"]
    assert commands["one"].stdout == "one\n"
    assert "sigma_rel 0.08 over 80 steps, from 10 snapshots; " in commands["one"].stderr
    assert "over 40 steps" in commands["early"].stderr
    assert "do not determine this length well; train with ema.sigma_rels nearer" in commands["early"].stderr


def test_command_searches_by_a_metric(commands: Commands) -> None:
    best = DDIMPipeline.from_pretrained(commands.output("search"))
    points = json.loads((commands.folder / "c.json").read_text())["points"]
    assert [point["sigma_rel"] for point in points] == pytest.approx(list(np.linspace(0.05, 0.2, 9)), abs=1e-6)
    chosen = max(points, key=lambda point: point["precision"])["sigma_rel"]
    expected = RunAverages(commands.folder / "run").reconstruct(chosen).pipe
    assert same_tensors(best.unet.state_dict(), expected.unet.state_dict())
    with Image.open(commands.folder / "c.png") as plot:
        assert len(plot.convert("RGB").getcolors(2**24) or ()) > 10
    assert len((commands.folder / "c.csv").read_text().splitlines()) == 10
    assert (commands.folder / "c.md").read_text().startswith("| sigma_rel | precision |")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("again", "one is not empty; pass --overwrite to replace a model in it, or write elsewhere"),
        ("several", "several lengths require --metric, and --reference, by which the best is chosen"),
        ("length", "--sigma-rel must be a number from 0.005 to 0.28, got 0.5"),
        ("text", "--sigma-rel must be a length, several such as 0.05,0.1, or a range such as 0.05..0.25, got"),
        ("ignored", "--count has no effect without --metric; leave it out"),
        ("metric", "--metric must be one of fid, kid, is, precision, or recall, got 'fod'"),
        ("reference", "--reference must be given for every metric but the inception score, got None"),
        ("curve", "--curve must end in .json, .csv, .md (Markdown), .png (a plot), or .svg (a plot), got 'c.txt'"),
        ("step", "--step must be one of 40 or 80, got 41"),
        ("model", "mnist is not a training run with checkpoints"),
        ("into", "run is a training run or one of its checkpoints; write to another folder"),
    ],
)
def test_command_refuses_in_one_line(commands: Commands, name: str, message: str) -> None:
    assert commands[name].code == 1
    assert commands[name].stderr.startswith(f"ddim: {message}")
    assert len(commands[name].stderr.splitlines()) == 1
    assert not (commands.folder / "new").exists()
