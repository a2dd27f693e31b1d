"""The paper's Tables 1 and 2 and its Figure 4 (arXiv 2010.02502, section 5) for any model, beside what it published.

- Table 1: the Fréchet distance for S in 10, 20, 50, 100, 1000 steps and eta in 0, 0.2, 0.5, 1, and for the larger
  sigma-hat of DDPM. Cell by cell the same seeds are painted.
- Table 2: the mean squared error per pixel in [0, 1] of encoding and decoding, by Euler's steps as the paper has them
  and exactly.
- Figure 4: seconds of painting, and the Fréchet distance, against the number of steps, eta = 0.

The paper's settings: `quad` timesteps for CIFAR-10, uniform (`leading`) ones elsewhere, averaged weights, 50,000
samples, and clipping as in the authors' code (`functions/denoising.py` of ermongroup/ddim): the predicted x_0 is left
as it is for every eta, and clipped with sigma-hat, where epsilon follows it. Clipping without that, which is what a
scheduler with `clip_sample` does, adds something of its own at every step, however small, so that eta = 0 tends to no
limit as steps become many.

Each cell is kept in a file by a hash of everything that changes it, so that an interrupted table goes on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddim.distributed import SINGLE_PROCESS, ProcessGroup
from ddim.evaluation.features import identity
from ddim.evaluation.image_sets import ImageSet, sample_image_set
from ddim.evaluation.metrics import compute_features, frechet
from ddim.io.atomic import atomic_write
from ddim.io.cache import cache_folder
from ddim.io.fingerprint import model_sha256
from ddim.io.json_files import to_json
from ddim.pipeline import DDIMPipeline

STEPS = (10, 20, 50, 100, 1000)
STEPS_2 = (10, 20, 50, 100, 200, 500, 1000)
SIGMA_HAT = "sigma-hat"
SIGMA_HAT_SETTINGS = {"eta": 1.0, "use_sigma_hat": True, "use_clipped_model_output": True}
ROWS: tuple[float | str, ...] = (0.0, 0.2, 0.5, 1.0, SIGMA_HAT)
PUBLISHED_1: dict[str, dict[float | str, tuple[float, ...]]] = {
    "CIFAR-10": {
        0.0: (13.36, 6.84, 4.67, 4.16, 4.04),
        0.2: (14.04, 7.11, 4.77, 4.25, 4.09),
        0.5: (16.66, 8.35, 5.25, 4.46, 4.29),
        1.0: (41.07, 18.36, 8.01, 5.78, 4.73),
        SIGMA_HAT: (367.43, 133.37, 32.72, 9.99, 3.17),
    },
    "CelebA": {
        0.0: (17.33, 13.73, 9.17, 6.53, 3.51),
        0.2: (17.66, 14.11, 9.51, 6.79, 3.64),
        0.5: (19.86, 16.06, 11.01, 8.09, 4.28),
        1.0: (33.12, 26.03, 18.48, 13.93, 5.98),
        SIGMA_HAT: (299.71, 183.83, 71.71, 45.20, 3.26),
    },
}
PUBLISHED_2 = dict(zip(STEPS_2, (0.014, 0.0065, 0.0023, 0.0009, 0.0004, 0.0001, 0.0001), strict=True))
"""On CIFAR-10."""

CLIPPING = "with sigma-hat only"
CIFAR_SHAPE = (3, 32, 32)
PUBLISHED_ON = {CIFAR_SHAPE: "CIFAR-10", (3, 64, 64): "CelebA"}
"""Pictures of these shapes are taken for those of the paper's data sets."""
BATCH = 32


@dataclass(frozen=True)
class Table:
    """A table of numbers.

    Attributes:
        title: what it shows.
        columns: their names, the first of the rows' names.
        rows: a name and a number, or `None`, for each other column.
        settings: what changes the numbers.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[float | None]]]
    settings: dict[str, Any]

    def markdown(self) -> str:
        """As Markdown, settings below."""
        lines = [f"| {' | '.join(self.columns)} |", "|---" * len(self.columns) + "|"]
        for name, values in self.rows:
            lines.append(f"| {' | '.join([name, *('' if v is None else f'{v:.3g}' for v in values)])} |")
        told = ", ".join(f"{key}: {value}" for key, value in self.settings.items())
        return f"{self.title}\n\n" + "\n".join(lines) + f"\n\n{told}\n"

    def json(self) -> dict[str, Any]:
        """As an object."""
        rows = [
            {self.columns[0]: name} | dict(zip(self.columns[1:], values, strict=True)) for name, values in self.rows
        ]
        return {"title": self.title, "rows": rows, "settings": self.settings}


def table_1(
    pipe: DDIMPipeline,
    reference: ImageSet,
    extractor: nn.Module,
    count: int,
    seed: int = 0,
    steps: Sequence[int] = STEPS,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Table:
    """Fréchet distances by steps and eta.

    Args:
        pipe: paints, with its scheduler's spacing.
        reference: the data.
        extractor: features.
        count: pictures a cell.
        seed: of the first picture of each cell.
        steps: the columns.
        group: the processes that share the work.
    """
    cells = _Cells(pipe, _settings(count, seed, extractor), group)
    real = compute_features(reference, extractor, group)
    rows: list[tuple[str, list[float | None]]] = []
    for eta in ROWS:
        values: list[float | None] = []
        for number in steps:
            settings: dict[str, Any] = {"num_inference_steps": number}
            settings |= SIGMA_HAT_SETTINGS if eta == SIGMA_HAT else {"eta": float(eta)}

            def measure(settings: dict[str, Any] = settings, eta: float | str = eta) -> dict[str, float]:
                name = f"{settings['num_inference_steps']} steps, {_row(eta)}"
                painted = sample_image_set(_papers(pipe, eta == SIGMA_HAT), count, seed, name, **settings)
                return {"fid": frechet(compute_features(painted, extractor, group).values, real.values)}

            values.append(cells.get({"table": 1, "reference": real.sha256} | settings, measure)["fid"])
        rows.append((_row(eta), values))
        if dataset := PUBLISHED_ON.get(pipe.sample_shape):
            published = dict(zip(STEPS, PUBLISHED_1[dataset][eta], strict=True))
            rows.append((f"{_row(eta)}, paper, {dataset}", [published.get(number) for number in steps]))
    return Table(
        "Fréchet distance by number of steps (Table 1 of the paper)",
        ["", *map(str, steps)],
        rows,
        cells.settings | {"reference": reference.name, "reference_count": reference.count},
    )


def table_2(
    pipe: DDIMPipeline, images: ImageSet, steps: Sequence[int] = STEPS_2, group: ProcessGroup = SINGLE_PROCESS
) -> Table:
    """Errors of encoding and decoding, by steps; the paper's row is Euler's on CIFAR-10."""
    samples = torch.cat(list(images.batches())).float() / 127.5 - 1
    sha256 = hashlib.sha256(samples.numpy().tobytes()).hexdigest()
    cells = _Cells(pipe, {"count": images.count}, group)
    parts = torch.split(samples, BATCH)
    results = []
    for number in steps:

        def measure(number: int = number) -> dict[str, float]:
            errors = {}
            for name, exact in (("euler", False), ("exact", True)):
                found = [
                    pipe.reconstruct(parts[part], number, exact=exact, output_type="pt").mse
                    for part in group.shard(len(parts))
                ]
                errors[name] = float(torch.cat(group.all_gather(found)).double().mean())
            return errors

        results.append(cells.get({"table": 2, "images": sha256, "num_inference_steps": number}, measure))
    return Table(
        "Mean squared error per pixel of encoding and decoding (Table 2 of the paper)",
        ["steps", *map(str, steps)],
        [
            ("paper, CIFAR-10", [PUBLISHED_2.get(number) for number in steps]),
            ("Euler, equation (13)", [result["euler"] for result in results]),
            ("exact", [result["exact"] for result in results]),
        ],
        cells.settings | {"images": images.name},
    )


def figure_4(
    pipe: DDIMPipeline,
    reference: ImageSet,
    extractor: nn.Module,
    count: int,
    seed: int = 0,
    steps: Sequence[int] = STEPS,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Table:
    """Seconds and Fréchet distance of `count` pictures, eta = 0; the times are of this machine."""
    cells = _Cells(pipe, _settings(count, seed, extractor), group)
    real = compute_features(reference, extractor, group)
    results = []
    for number in steps:

        def measure(number: int = number) -> dict[str, float]:
            painted = sample_image_set(_papers(pipe, False), count, seed, f"{number} steps", num_inference_steps=number)
            started = time.perf_counter()
            found = compute_features(painted, extractor, group)
            seconds = time.perf_counter() - started
            return {"seconds": seconds, "fid": frechet(found.values, real.values)}

        key = {"figure": 4, "reference": real.sha256, "num_inference_steps": number, "processes": group.size}
        results.append(cells.get(key, measure))
    return Table(
        "Seconds, and Fréchet distance, by number of steps (Figure 4 of the paper)",
        ["steps", *map(str, steps)],
        [
            (f"seconds for {count} pictures", [result["seconds"] for result in results]),
            ("Fréchet distance", [result["fid"] for result in results]),
        ],
        cells.settings | {"reference": reference.name, "reference_count": reference.count, "processes": group.size},
    )


def plot(table: Table, path: Path) -> None:
    """Lines over the number of steps, both axes logarithmic: a PNG or SVG, by the suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = [int(column) for column in table.columns[1:]]
    for name, values in table.rows:
        points = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None]
        style = "--" if "paper" in name else "-"
        axes.plot([s for s, _ in points], [v for _, v in points], style, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="steps", title=table.title)
    axes.legend(fontsize="small")
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


def _settings(count: int, seed: int, extractor: nn.Module) -> dict[str, Any]:
    return {"count": count, "seed": seed, "features": identity(extractor), "clipping": CLIPPING}


def _papers(pipe: DDIMPipeline, clip_sample: bool) -> DDIMPipeline:
    """The pipeline as in the paper: order 1, formulas for timesteps; clipping or not."""
    settings = {"clip_sample": clip_sample, "thresholding": False, "solver_order": 1, "timesteps_by_steps": None}
    scheduler = pipe.scheduler.from_config(pipe.scheduler.config, **settings)
    return DDIMPipeline(pipe.unet, scheduler, pipe.engine)


class _Cells:
    """Results kept by a hash of what changes them."""

    def __init__(self, pipe: DDIMPipeline, settings: dict[str, Any], group: ProcessGroup) -> None:
        self._group = group
        # The rest is the tables' own affair.
        own = ("clip_sample", "thresholding", "solver_order", "timesteps_by_steps")
        config = {key: value for key, value in pipe.scheduler.config.items() if key[0] != "_" and key not in own}
        self._key = settings | {"model_sha256": model_sha256(pipe), "scheduler": config}
        self.settings = settings | {"spacing": config["timestep_spacing"]}

    def get(self, key: dict[str, Any], measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        text = to_json(self._key | key)
        path = cache_folder() / "tables" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        kept = self._group.broadcast(self._read(path) if self._group.is_main else None)
        if kept is not None:
            return kept
        result = measure()
        if self._group.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                temporary.write_text(to_json({"key": self._key | key, "result": result}))
        return result

    @staticmethod
    def _read(path: Path) -> dict[str, float] | None:
        """A result that is kept; damaged ones are removed."""
        try:
            result: dict[str, float] = json.loads(path.read_text())["result"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            path.unlink()
            return None
        return result


def _row(eta: float | str) -> str:
    return eta if isinstance(eta, str) else f"eta = {eta:g}"
