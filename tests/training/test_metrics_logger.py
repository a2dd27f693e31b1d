"""The metrics of a run: lines to the byte, TensorBoard's files as TensorBoard itself reads them, the loss curve."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddim.training.metrics_logger import MetricsLogger, memory_mib, plot_loss, summarize
from ddim.training.progress import Progress, StepMetrics

CPU = torch.device("cpu")


def make_metrics(count: int, seed: int = 0) -> list[StepMetrics]:
    """Metrics of steps of 8 images, two in each quarter of the timesteps."""
    rng = random.Random(seed)
    return [
        StepMetrics(rng.random(), 3 * rng.random(), tuple(rng.random() for _ in range(4)), (2.0,) * 4)
        for _ in range(count)
    ]


def log_steps(metrics_logger: MetricsLogger, step_metrics: list[StepMetrics], first: int = 1) -> None:
    """Log the steps from `first` on."""
    collected: list[StepMetrics] = []
    for step, metrics in enumerate(step_metrics[first - 1 :], first):
        collected.append(metrics)
        metrics_logger.log_step(Progress(step, collected, 100.0 + step), 1e-3 / step)
    metrics_logger.close()


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: (step, value) by name."""
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def lines(out: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        pytest.fail(f"{name} is not valid JSON")

    return [json.loads(line, parse_constant=refuse) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- lines


def test_line_holds_means_of_its_steps(tmp_path: Path) -> None:
    step_metrics = make_metrics(10)
    log_steps(MetricsLogger(tmp_path, 0, 4, CPU), step_metrics)
    written = lines(tmp_path)
    assert [line["step"] for line in written] == [4, 8]
    for line, part in zip(written, (step_metrics[:4], step_metrics[4:8]), strict=True):
        assert line.keys() == {"step", "loss", "loss_by_quartile", "grad_norm", "learning_rate"}
        assert line["loss"] == pytest.approx(np.mean([metrics.loss for metrics in part]), rel=1e-12)
        assert line["grad_norm"] == pytest.approx(np.mean([metrics.grad_norm for metrics in part]), rel=1e-12)
        assert line["learning_rate"] == 1e-3 / line["step"]
        quartiles = np.sum([metrics.quartile_sums for metrics in part], 0) / 8
        assert line["loss_by_quartile"] == pytest.approx(list(quartiles), rel=1e-12)


def test_logged_metrics_are_cleared(tmp_path: Path) -> None:
    metrics_logger, step_metrics = MetricsLogger(tmp_path, 0, 3, CPU), make_metrics(2)
    metrics_logger.log_step(Progress(2, step_metrics, 1.0), 0.1)
    assert len(step_metrics) == 2
    step_metrics.append(step_metrics[0])
    metrics_logger.log_step(Progress(3, step_metrics, 1.0), 0.1)
    metrics_logger.close()
    assert step_metrics == []


def test_quartile_without_samples_is_none() -> None:
    step_metrics = [
        StepMetrics(1.0, 1.0, (3.0, 0.0, 0.0, 1.0), (2.0, 0.0, 0.0, 1.0)),
        StepMetrics(1.0, 1.0, (0.0, 0.0, 4.0, 1.0), (0.0, 0.0, 1.0, 3.0)),
    ]
    assert summarize(step_metrics)["loss_by_quartile"] == [1.5, None, 4.0, 0.5]


def test_infinite_norms_are_left_out(tmp_path: Path) -> None:
    part = [
        StepMetrics(0.5, norm, (1.0,) * 4, (2.0,) * 4) for norm in (math.inf, 2.0, math.nan, 4.0, math.inf, math.nan)
    ]
    log_steps(MetricsLogger(tmp_path, 0, 2, CPU), part)
    assert [line["grad_norm"] for line in lines(tmp_path)] == [2.0, 4.0, None]
    assert scalars(tmp_path)["grad_norm"] == [(2, 2.0), (4, 4.0)]


# --- resuming


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_resumed_lines_equal_uninterrupted_lines(tmp_path: Path, cut: int) -> None:
    """Wherever the file ended when the process was killed."""
    uninterrupted, parts, step_metrics = tmp_path / "uninterrupted", tmp_path / "parts", make_metrics(20)
    for out in (uninterrupted, parts):
        out.mkdir()
        log_steps(MetricsLogger(out, 0, 2, CPU), step_metrics)
    path = parts / "metrics.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    # The last checkpoint was of step 13, and held the metrics that no line covers.
    metrics_logger = MetricsLogger(parts, 13, 2, CPU)
    assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[:6])
    collected = step_metrics[12:13]
    for step in range(14, 21):
        collected.append(step_metrics[step - 1])
        metrics_logger.log_step(Progress(step, collected, 1.0), 1e-3 / step)
    metrics_logger.close()
    assert path.read_bytes() == content == (uninterrupted / "metrics.jsonl").read_bytes()
    assert [path.name for path in parts.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "garbage", [b"\0" * 50 + b"\n", b"\xff\xfe\n", b'{"step": 3, "loss": 0.1}}\n', b"[1]\n", b"{}\n", b"3\n"]
)
def test_damaged_lines_are_dropped(tmp_path: Path, garbage: bytes) -> None:
    """A power failure can leave arbitrary bytes after what was written."""
    good = b'{"step": 2, "loss": 0.25}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + garbage)
    MetricsLogger(tmp_path, 5, 2, CPU).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == good


def test_valid_file_is_not_rewritten(tmp_path: Path) -> None:
    log_steps(MetricsLogger(tmp_path, 0, 2, CPU), make_metrics(6))
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    MetricsLogger(tmp_path, 6, 2, CPU).close()
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


# --- TensorBoard


def test_tensorboard_holds_lines_and_rates(tmp_path: Path) -> None:
    log_steps(MetricsLogger(tmp_path, 0, 5, CPU), make_metrics(15))
    shown, written = scalars(tmp_path), lines(tmp_path)
    assert shown.keys() == {
        "loss",
        *(f"loss_by_quartile/{quarter}" for quarter in (1, 2, 3, 4)),
        "grad_norm",
        "learning_rate",
        "images_per_second",
        "memory_mib",
    }
    for name in ("loss", "grad_norm", "learning_rate"):
        assert shown[name] == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in written]
    for quarter in range(4):
        expected = [(line["step"], pytest.approx(line["loss_by_quartile"][quarter], rel=1e-6)) for line in written]
        assert shown[f"loss_by_quartile/{quarter + 1}"] == expected
    assert shown["images_per_second"] == [(5, 105.0), (10, 110.0), (15, 115.0)]
    assert all(value > 10 for _, value in shown["memory_mib"])


def test_tensorboard_drops_steps_after_the_checkpoint(tmp_path: Path) -> None:
    step_metrics = make_metrics(12)
    log_steps(MetricsLogger(tmp_path, 0, 2, CPU), step_metrics[:10])
    log_steps(MetricsLogger(tmp_path, 6, 2, CPU), step_metrics, first=7)
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [2, 4, 6, 8, 10, 12]
    assert [step for step, _ in scalars(tmp_path)["images_per_second"]] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)], ids=["gray", "color"])
def test_tensorboard_shows_images(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    metrics_logger = MetricsLogger(tmp_path, 0, 2, CPU)
    metrics_logger.log_image(4, Image.fromarray(pixels), tmp_path / "samples.png")
    metrics_logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Images("samples")
    (tmp_path / "shown.png").write_bytes(event.encoded_image_string)
    with Image.open(tmp_path / "shown.png") as shown:
        assert (event.step, event.width, event.height) == (4, 7, 5)
        assert np.array_equal(np.asarray(shown).reshape(5, 7, -1)[..., -1], pixels.reshape(5, 7, -1)[..., -1])


def test_memory_matches_vmrss() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    before = memory_mib(CPU)
    (held,) = [int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS")]
    assert before == pytest.approx(held, rel=0.05)
    block = np.ones(2**23)
    assert memory_mib(CPU) - before == pytest.approx(64, abs=16)
    del block


# --- the curve


def color_images(path: Path) -> int:
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (600, 300))
        return len(image.convert("RGB").getcolors(2**24))


def test_loss_curve_is_drawn_from_lines_with_losses(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    content = [
        {"step": 2, "loss": 0.5, "loss_by_quartile": [1.0, 0.5, None, 0.1]},
        {"step": 2, "held_out_loss": 0.5},
        {"step": 4, "loss": 0.25, "loss_by_quartile": [0.9, 0.4, 0.2, None]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in content))
    plot_loss(path, tmp_path / "loss.png")
    drawn = color_images(tmp_path / "loss.png")
    path.write_text("")
    plot_loss(path, tmp_path / "empty.png")
    # Five curves, antialiased, and their names.
    assert drawn > color_images(tmp_path / "empty.png") > 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.png", "loss.png", "metrics.jsonl"]
