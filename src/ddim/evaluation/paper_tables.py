"""Tables 1 to 3 and Figure 4 of the paper (arXiv 2010.02502) for any model, beside the published values.

- Table 1: the Fréchet distance for S in 10, 20, 50, 100, 1000 steps and eta in 0, 0.2, 0.5, 1, and for the larger
  sigma-hat of DDPM. All cells use the same seeds.
- Table 2: the mean squared error per pixel in [0, 1] of encoding and decoding, by Euler steps as in the paper, and
  exactly.
- Table 3 (appendix D): the Fréchet distance for S in 10, 20, 50, 100 steps and eta in 0, 1; the cells are those of
  Table 1.
- Figure 4: seconds of sampling and the Fréchet distance against the number of steps, eta = 0.

The paper's settings: `quad` timesteps for CIFAR-10, uniform (`leading`) ones elsewhere, averaged weights, 50,000
samples, and clipping as in the authors' code (`functions/denoising.py` of ermongroup/ddim): the predicted x_0 is not
clipped for any eta; with sigma-hat it is clipped, and epsilon is recomputed from it. Clipping x_0 alone, as a scheduler
with `clip_sample` does, adds an error at every step however small the step is, so that samples with eta = 0 do not
converge as the number of steps grows.

Each cell is cached by a hash of everything that changes it, so that an interrupted table resumes.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ddim.diffusion.sampling_config import SamplingConfig
from ddim.distributed import SINGLE_PROCESS, ProcessGroup
from ddim.evaluation.features import extractor_id
from ddim.evaluation.image_sets import ImageSet, check_own_number_of_steps, sample_image_set
from ddim.evaluation.metrics import FeatureSet, compute_features, frechet
from ddim.extras import require
from ddim.io.atomic import atomic_write
from ddim.io.cache import Cache
from ddim.io.fingerprint import model_sha256
from ddim.io.json_files import to_json
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler

TABLE_1_STEPS = (10, 20, 50, 100, 1000)
"""Numbers of steps in Table 1 and Figure 4."""
TABLE_2_STEPS = (10, 20, 50, 100, 200, 500, 1000)
TABLE_3_STEPS = (10, 20, 50, 100)
SIGMA_HAT = "sigma-hat"
SIGMA_HAT_SETTINGS = {"eta": 1.0, "use_sigma_hat": True, "use_clipped_model_output": True}
ETAS: tuple[float | str, ...] = (0.0, 0.2, 0.5, 1.0, SIGMA_HAT)
"""The rows of Table 1."""
PUBLISHED_FID: dict[str, dict[float | str, tuple[float, ...]]] = {
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
PUBLISHED_MSE = dict(zip(TABLE_2_STEPS, (0.014, 0.0065, 0.0023, 0.0009, 0.0004, 0.0001, 0.0001), strict=True))
"""Table 2, on CIFAR-10."""
TABLE_3_ETAS: tuple[float, ...] = (0.0, 1.0)
PUBLISHED_LSUN_FID: dict[str, dict[float | str, tuple[float, ...]]] = {
    "Bedroom": {0.0: (16.95, 8.89, 6.75, 6.62), 1.0: (42.78, 22.77, 10.81, 6.81)},
    "Church": {0.0: (19.45, 12.47, 10.84, 10.58), 1.0: (51.56, 23.37, 11.16, 8.27)},
}
"""Table 3. The shape of an image does not tell which of the two data sets it is of."""
CLIPPING = "with sigma-hat only"
CIFAR_SHAPE = (3, 32, 32)
LSUN_SHAPE = (3, 256, 256)
DATASET_BY_SHAPE = {CIFAR_SHAPE: "CIFAR-10", (3, 64, 64): "CelebA"}
"""The paper's data sets; images of these shapes are assumed to be theirs."""
RECONSTRUCTION_BATCH_SIZE = 32


@dataclass(frozen=True)
class ResultTable:
    """A table of numbers.

    Attributes:
        title: what it shows.
        columns: names of the columns; the first is that of the rows' names.
        rows: the rows' names, each with a number or `None` per further column.
        settings: everything that changes the numbers.

    Example:
        >>> table = ResultTable("Squares", ["n", "2", "3"], [("n^2", [4.0, 9.0])], {"exact": True})
        >>> print(table.markdown())
        Squares
        <BLANKLINE>
        | n | 2 | 3 |
        |---|---|---|
        | n^2 | 4 | 9 |
        <BLANKLINE>
        exact: True
        <BLANKLINE>
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[float | None]]]
    settings: dict[str, Any]

    def markdown(self) -> str:
        """Return the table as Markdown, with its settings below."""
        lines = [f"| {' | '.join(self.columns)} |", "|---" * len(self.columns) + "|"]
        for name, values in self.rows:
            lines.append(f"| {' | '.join([name, *('' if v is None else f'{v:.3g}' for v in values)])} |")
        settings = ", ".join(f"{key}: {value}" for key, value in self.settings.items())
        return f"{self.title}\n\n" + "\n".join(lines) + f"\n\n{settings}\n"

    def json(self) -> dict[str, Any]:
        """Return the table as a JSON object."""
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
    steps: Sequence[int] = TABLE_1_STEPS,
    group: ProcessGroup = SINGLE_PROCESS,
) -> ResultTable:
    """Compute Table 1: Fréchet distances by number of steps and eta.

    Args:
        pipe: the model, with its scheduler's spacing.
        reference: the data.
        extractor: the feature extractor.
        count: images per cell.
        seed: seed of the first image of each cell.
        steps: numbers of steps, the columns.
        group: the processes that share the work.

    Returns:
        The table, with the paper's rows for images of the shapes of its data sets.

    References:
        Song et al., Table 1, arXiv 2010.02502.
    """
    dataset = DATASET_BY_SHAPE.get(pipe.sample_shape)
    published = {} if dataset is None else {dataset: (TABLE_1_STEPS, PUBLISHED_FID[dataset])}
    title = "Fréchet distance by number of steps (Table 1 of the paper)"
    return _Distances(pipe, reference, extractor, count, seed, group).table(title, ETAS, steps, published)


def table_3(
    pipe: DDIMPipeline,
    reference: ImageSet,
    extractor: nn.Module,
    count: int,
    seed: int = 0,
    steps: Sequence[int] = TABLE_3_STEPS,
    group: ProcessGroup = SINGLE_PROCESS,
) -> ResultTable:
    """Compute Table 3: Fréchet distances by number of steps for eta = 0 and eta = 1.

    Args:
        pipe: the model, with its scheduler's spacing.
        reference: the data.
        extractor: the feature extractor.
        count: images per cell.
        seed: seed of the first image of each cell.
        steps: numbers of steps, the columns.
        group: the processes that share the work.

    Returns:
        The table, with the paper's rows of both its data sets, LSUN bedrooms and churches, for images of 3x256x256.

    References:
        Song et al., Table 3 (appendix D), arXiv 2010.02502.
    """
    published = {}
    if pipe.sample_shape == LSUN_SHAPE:
        published = {name: (TABLE_3_STEPS, rows) for name, rows in PUBLISHED_LSUN_FID.items()}
    title = "Fréchet distance by number of steps (Table 3 of the paper)"
    return _Distances(pipe, reference, extractor, count, seed, group).table(title, TABLE_3_ETAS, steps, published)


def table_2(
    pipe: DDIMPipeline, images: ImageSet, steps: Sequence[int] = TABLE_2_STEPS, group: ProcessGroup = SINGLE_PROCESS
) -> ResultTable:
    """Compute Table 2: errors of encoding and decoding by number of steps.

    Args:
        pipe: the model, with its scheduler's spacing.
        images: the images to encode.
        steps: numbers of steps, the columns.
        group: the processes that share the work.

    Returns:
        The table, with the paper's row, which is that of Euler steps on CIFAR-10.

    References:
        Song et al., Table 2, arXiv 2010.02502.
    """
    for number in steps:
        check_own_number_of_steps(pipe, number)
    samples = torch.cat(list(images.batches())).float()
    samples = samples / 127.5 - 1 if images.pixel_format.is_eight_bit else (2 * samples - 1).clamp(-1, 1)
    sha256 = hashlib.sha256(samples.numpy().tobytes()).hexdigest()
    cache = _CellCache(pipe, {"count": images.count}, group)
    batches = torch.split(samples, RECONSTRUCTION_BATCH_SIZE)
    results = []
    for number in steps:

        def measure(number: int = number) -> dict[str, float]:
            errors = {}
            for name, exact in (("euler", False), ("exact", True)):
                shard = [
                    pipe.reconstruct(batches[batch], number, exact=exact, output_type="pt").mse
                    for batch in group.shard(len(batches))
                ]
                errors[name] = float(torch.cat(group.all_gather(shard)).double().mean())
            return errors

        key = {"table": 2, "images": sha256, "num_inference_steps": number}
        results.append(cache.get(key, ("euler", "exact"), measure))
    return ResultTable(
        "Mean squared error per pixel of encoding and decoding (Table 2 of the paper)",
        ["steps", *map(str, steps)],
        [
            ("paper, CIFAR-10", [PUBLISHED_MSE.get(number) for number in steps]),
            ("Euler, equation (13)", [result["euler"] for result in results]),
            ("exact", [result["exact"] for result in results]),
        ],
        cache.settings | {"images": images.name},
    )


def figure_4(
    pipe: DDIMPipeline,
    reference: ImageSet,
    extractor: nn.Module,
    count: int,
    seed: int = 0,
    steps: Sequence[int] = TABLE_1_STEPS,
    group: ProcessGroup = SINGLE_PROCESS,
) -> ResultTable:
    """Compute Figure 4: seconds of sampling on this machine, and Fréchet distances, for eta = 0.

    Args:
        pipe: the model, with its scheduler's spacing.
        reference: the data.
        extractor: the feature extractor.
        count: images per column.
        seed: seed of the first image of each column.
        steps: numbers of steps, the columns.
        group: the processes that share the work.

    Returns:
        The table, which `plot` draws.

    References:
        Song et al., Figure 4, arXiv 2010.02502.
    """
    cache = _CellCache(pipe, _settings(count, seed, extractor), group)
    real = compute_features(reference, extractor, group)
    machine = _describe_machine(pipe) | {"processes": group.size}
    results = []
    for number in steps:

        def measure(number: int = number) -> dict[str, float]:
            paper_pipe = _with_paper_settings(pipe, clip_sample=False)
            samples = sample_image_set(paper_pipe, count, seed, f"{number} steps", num_inference_steps=number)
            started = time.perf_counter()
            features = compute_features(samples, extractor, group)
            seconds = time.perf_counter() - started
            return {"seconds": seconds, "fid": frechet(features.values, real.values)}

        key = {"figure": 4, "reference": real.sha256, "num_inference_steps": number, "host": platform.node()} | machine
        results.append(cache.get(key, ("seconds", "fid"), measure))
    return ResultTable(
        "Seconds, and Fréchet distance, by number of steps (Figure 4 of the paper)",
        ["steps", *map(str, steps)],
        [
            (f"seconds for {count} images", [result["seconds"] for result in results]),
            ("Fréchet distance", [result["fid"] for result in results]),
        ],
        cache.settings | {"reference": reference.name, "reference_count": reference.count} | machine,
    )


def plot(table: ResultTable, path: Path) -> None:
    """Plot the rows of a table over the number of steps, both axes logarithmic.

    Args:
        table: a table whose columns are numbers of steps.
        path: a PNG or SVG file.

    Raises:
        OSError: if it cannot be written.
    """
    require("a plot", "matplotlib")
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


@dataclass(frozen=True)
class _Distances:
    """Fréchet distances of a model's samples to data: the cells of Tables 1 and 3.

    Attributes:
        pipe: the model, with its scheduler's spacing.
        reference: the data.
        extractor: the feature extractor.
        count: images per cell.
        seed: seed of the first image of each cell.
        group: the processes that share the work.
    """

    pipe: DDIMPipeline
    reference: ImageSet
    extractor: nn.Module
    count: int
    seed: int
    group: ProcessGroup

    def table(
        self,
        title: str,
        etas: Sequence[float | str],
        steps: Sequence[int],
        published: Mapping[str, tuple[Sequence[int], Mapping[float | str, Sequence[float]]]],
    ) -> ResultTable:
        """Compute a table of distances by eta and number of steps.

        Args:
            title: of the table.
            etas: the rows.
            steps: numbers of steps, the columns.
            published: by data set, the paper's numbers of steps and its rows, which are shown below ours.
        """
        cache = _CellCache(self.pipe, _settings(self.count, self.seed, self.extractor), self.group)
        real = compute_features(self.reference, self.extractor, self.group)
        rows: list[tuple[str, list[float | None]]] = []
        for eta in etas:
            rows.append((_row_name(eta), [self._cell(cache, real, eta, number) for number in steps]))
            for dataset, (published_steps, published_rows) in published.items():
                by_steps = dict(zip(published_steps, published_rows[eta], strict=True))
                rows.append((f"{_row_name(eta)}, paper, {dataset}", [by_steps.get(number) for number in steps]))
        facts = {"reference": self.reference.name, "reference_count": self.reference.count}
        return ResultTable(title, ["", *map(str, steps)], rows, cache.settings | facts)

    def _cell(self, cache: _CellCache, real: FeatureSet, eta: float | str, number: int) -> float:
        """Return the distance of samples in a number of steps, from the cache where it is known."""
        settings: dict[str, Any] = {"num_inference_steps": number}
        settings |= SIGMA_HAT_SETTINGS if eta == SIGMA_HAT else {"eta": float(eta)}

        def measure() -> dict[str, float]:
            paper_pipe = _with_paper_settings(self.pipe, clip_sample=eta == SIGMA_HAT)
            name = f"{number} steps, {_row_name(eta)}"
            samples = sample_image_set(paper_pipe, self.count, self.seed, name, **settings)
            return {"fid": frechet(compute_features(samples, self.extractor, self.group).values, real.values)}

        # Tables 1 and 3 have cells in common, under the same key.
        key = {"table": 1, "reference": real.sha256, "sampling": SamplingConfig(**settings).fingerprint()}
        return cache.get(key, ("fid",), measure)["fid"]


def _settings(count: int, seed: int, extractor: nn.Module) -> dict[str, Any]:
    return {"count": count, "seed": seed, "features": extractor_id(extractor), "clipping": CLIPPING}


def _describe_machine(pipe: DDIMPipeline) -> dict[str, Any]:
    """Return what changes the time of sampling, beside the settings of the samples."""
    device = pipe.device
    return {
        "engine": pipe.engine,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _with_paper_settings(pipe: DDIMPipeline, clip_sample: bool) -> DDIMPipeline:
    """Return the pipeline with the paper's settings: order 1 and timesteps from formulas; with or without clipping."""
    settings = {"clip_sample": clip_sample, "thresholding": False, **DDIMScheduler.own_settings}
    scheduler = pipe.scheduler.from_config(pipe.scheduler.config, **settings)
    return DDIMPipeline(pipe.unet, scheduler, engine=pipe.engine)


class _CellCache:
    """Results in the cache folder, by a hash of what changes them."""

    def __init__(self, pipe: DDIMPipeline, settings: dict[str, Any], group: ProcessGroup) -> None:
        self._group = group
        # The tables set these themselves, whatever the pipeline's scheduler has.
        overridden = ("clip_sample", "thresholding", *DDIMScheduler.own_settings)
        config = {key: value for key, value in pipe.scheduler.config.items() if key[0] != "_" and key not in overridden}
        self._key = settings | {"model_sha256": model_sha256(pipe), "scheduler": config}
        self.settings = settings | {"spacing": config["timestep_spacing"]}

    def get(
        self, key: dict[str, Any], names: Sequence[str], measure: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """Return a cached result; if there is none, measure it and cache it.

        Args:
            key: what distinguishes the cell from others of the same settings.
            names: of the result's entries.
            measure: computes the result, in all processes together.
        """
        full_key = self._key | key
        entry = hashlib.sha256(to_json(full_key).encode()).hexdigest()
        cache = Cache("tables")

        def parse(content: np.ndarray) -> dict[str, float]:
            cell = json.loads(content.tobytes())
            if to_json(cell["key"]) != to_json(full_key):
                raise ValueError("it is of another cell")
            return {name: float(cell["result"][name]) for name in names}

        cached = cache.read(entry, parse) if self._group.is_main else None
        if (cached := self._group.broadcast(cached)) is not None:
            return cached
        result = measure()
        if self._group.is_main:
            cache.write(entry, [to_json({"key": full_key, "result": result}).encode()])
        return result


def _row_name(eta: float | str) -> str:
    return eta if isinstance(eta, str) else f"eta = {eta:g}"
