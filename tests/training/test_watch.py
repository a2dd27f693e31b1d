"""What is written down of a run: the metrics to the byte, TensorBoard's files as TensorBoard itself reads them, the
curve as a picture.
"""

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

from ddim.training.metrics_logger import MetricsLogger, memory_mib, plot_loss, summary
from ddim.training.trainer import Progress, Record

CPU = torch.device("cpu")


def make_records(count: int, seed: int = 0) -> list[Record]:
    """Of so many steps of 8 images, two in each quarter of the timesteps."""
    chance = random.Random(seed)
    return [
        Record(chance.random(), 3 * chance.random(), tuple(chance.random() for _ in range(4)), (2.0,) * 4)
        for _ in range(count)
    ]


def watch_steps(watch: MetricsLogger, records: list[Record], first: int = 1) -> None:
    """Let the steps from `first` on happen."""
    collected: list[Record] = []
    for step, record in enumerate(records[first - 1 :], first):
        collected.append(record)
        watch.add(Progress(step, collected, 100.0 + step), 1e-3 / step)
    watch.close()


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show: (step, value) by name."""
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def lines(out: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- lines


def test_a_line_holds_the_means_of_its_steps(tmp_path: Path) -> None:
    records = make_records(10)
    watch_steps(MetricsLogger(tmp_path, 0, 4, CPU), records)
    written = lines(tmp_path)
    assert [line["step"] for line in written] == [4, 8]
    for line, part in zip(written, (records[:4], records[4:8]), strict=True):
        assert line.keys() == {"step", "loss", "loss_by_quartile", "grad_norm", "learning_rate"}
        assert line["loss"] == pytest.approx(np.mean([record.loss for record in part]), rel=1e-12)
        assert line["grad_norm"] == pytest.approx(np.mean([record.grad_norm for record in part]), rel=1e-12)
        assert line["learning_rate"] == 1e-3 / line["step"]
        quartiles = np.sum([record.quartile_sums for record in part], 0) / 8
        assert line["loss_by_quartile"] == pytest.approx(list(quartiles), rel=1e-12)


def test_records_are_taken_out_once_they_are_counted(tmp_path: Path) -> None:
    watch, records = MetricsLogger(tmp_path, 0, 3, CPU), make_records(2)
    watch.add(Progress(2, records, 1.0), 0.1)
    assert len(records) == 2
    records.append(records[0])
    watch.add(Progress(3, records, 1.0), 0.1)
    watch.close()
    assert records == []


def test_a_quarter_without_samples_has_no_loss() -> None:
    records = [
        Record(1.0, 1.0, (3.0, 0.0, 0.0, 1.0), (2.0, 0.0, 0.0, 1.0)),
        Record(1.0, 1.0, (0.0, 0.0, 4.0, 1.0), (0.0, 0.0, 1.0, 3.0)),
    ]
    assert summary(records)["loss_by_quartile"] == [1.5, None, 4.0, 0.5]


def test_steps_that_loss_scaling_skipped_have_no_norm(tmp_path: Path) -> None:
    part = [Record(0.5, norm, (1.0,) * 4, (2.0,) * 4) for norm in (math.inf, 2.0, math.nan, 4.0, math.inf, math.nan)]
    watch_steps(MetricsLogger(tmp_path, 0, 2, CPU), part)
    assert [line["grad_norm"] for line in lines(tmp_path)] == [2.0, 4.0, None]
    assert scalars(tmp_path)["grad_norm"] == [(2, 2.0), (4, 4.0)]


# --- going on


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_going_on_leaves_the_lines_of_a_straight_run(tmp_path: Path, cut: int) -> None:
    """Wherever the end of the file was when the process died."""
    straight, parts, records = tmp_path / "straight", tmp_path / "parts", make_records(20)
    for out in (straight, parts):
        out.mkdir()
        watch_steps(MetricsLogger(out, 0, 2, CPU), records)
    path = parts / "metrics.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    # The last checkpoint was of step 13, and held what no line had counted.
    watch = MetricsLogger(parts, 13, 2, CPU)
    assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[:6])
    collected = records[12:13]
    for step in range(14, 21):
        collected.append(records[step - 1])
        watch.add(Progress(step, collected, 1.0), 1e-3 / step)
    watch.close()
    assert path.read_bytes() == content == (straight / "metrics.jsonl").read_bytes()
    assert [path.name for path in parts.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "garbage", [b"\0" * 50 + b"\n", b"\xff\xfe\n", b'{"step": 3, "loss": 0.1}}\n', b"[1]\n", b"{}\n", b"3\n"]
)
def test_lines_that_are_none_are_dropped(tmp_path: Path, garbage: bytes) -> None:
    """A power cut can leave anything behind what was written."""
    good = b'{"step": 2, "loss": 0.25}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + garbage)
    MetricsLogger(tmp_path, 5, 2, CPU).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == good


def test_what_is_right_is_not_written_again(tmp_path: Path) -> None:
    watch_steps(MetricsLogger(tmp_path, 0, 2, CPU), make_records(6))
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    MetricsLogger(tmp_path, 6, 2, CPU).close()
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


# --- TensorBoard


def test_tensorboard_shows_what_the_lines_say_and_more(tmp_path: Path) -> None:
    watch_steps(MetricsLogger(tmp_path, 0, 5, CPU), make_records(15))
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


def test_tensorboard_forgets_steps_after_the_checkpoint(tmp_path: Path) -> None:
    records = make_records(12)
    watch_steps(MetricsLogger(tmp_path, 0, 2, CPU), records[:10])
    watch_steps(MetricsLogger(tmp_path, 6, 2, CPU), records, first=7)
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [2, 4, 6, 8, 10, 12]
    assert [step for step, _ in scalars(tmp_path)["images_per_second"]] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)], ids=["grey", "colour"])
def test_tensorboard_shows_pictures(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    watch = MetricsLogger(tmp_path, 0, 2, CPU)
    watch.picture(4, Image.fromarray(pixels))
    watch.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Images("samples")
    (tmp_path / "shown.png").write_bytes(event.encoded_image_string)
    with Image.open(tmp_path / "shown.png") as shown:
        assert (event.step, event.width, event.height) == (4, 7, 5)
        assert np.array_equal(np.asarray(shown).reshape(5, 7, -1)[..., -1], pixels.reshape(5, 7, -1)[..., -1])


def test_memory_is_what_the_process_holds() -> None:
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


def colours(path: Path) -> int:
    with Image.open(path) as picture:
        assert (picture.format, picture.size) == ("PNG", (600, 300))
        return len(picture.convert("RGB").getcolors(2**24))


def test_the_curve_is_drawn_from_lines_with_losses(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    content = [
        {"step": 2, "loss": 0.5, "loss_by_quartile": [1.0, 0.5, None, 0.1]},
        {"step": 2, "held_out_loss": 0.5},
        {"step": 4, "loss": 0.25, "loss_by_quartile": [0.9, 0.4, 0.2, None]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in content))
    plot_loss(path, tmp_path / "loss.png")
    drawn = colours(tmp_path / "loss.png")
    path.write_text("")
    plot_loss(path, tmp_path / "empty.png")
    # Five curves, with their shades, and their names.
    assert drawn > colours(tmp_path / "empty.png") > 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.png", "loss.png", "metrics.jsonl"]
