"""Metrics along one quantity: the steps of a run's checkpoints, the lengths of its averages."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ddim.distributed import SINGLE_PROCESS, ProcessGroup
from ddim.evaluation import report
from ddim.evaluation.image_sets import ImageSet
from ddim.extras import require
from ddim.io.atomic import atomic_write
from ddim.io.json_files import to_json

PLOT_SUFFIXES = {".png": "a plot", ".svg": "a plot"}
HIGHER_IS_BETTER = ("is", "precision", "recall")


class CurvePoint(NamedTuple):
    """A point of a curve.

    Attributes:
        x: the quantity.
        metrics: values by name.

    Example:
        >>> CurvePoint(1000, {"fid": 12.5}).metrics["fid"]
        12.5
    """

    x: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Curve:
    """Metrics of several models along one quantity.

    Attributes:
        quantity: its name: `step`, `sigma_rel`.
        points: in ascending order of the quantity.
        settings: everything else that changes the numbers.

    Example:
        >>> curve = Curve("step", [CurvePoint(1000, {"fid": 30.0}), CurvePoint(2000, {"fid": 12.5})], {"count": 500})
        >>> curve.best("fid").x
        2000
        >>> print(curve.markdown(), end="")
        | step | Fréchet distance |
        | --- | --- |
        | 1000 | 30 |
        | 2000 | 12.5 |
    """

    quantity: str
    points: Sequence[CurvePoint]
    settings: dict[str, Any]

    def best(self, metric: str) -> CurvePoint:
        """Return the point with the best value of a metric, the first of several.

        Args:
            metric: its name.
        """
        sign = -1 if metric in HIGHER_IS_BETTER else 1
        return min(self.points, key=lambda point: sign * point.metrics[metric])

    def rows(self) -> list[list[str]]:
        """Return the names of the columns, then the points, as text."""
        names = self._metrics()
        values = [[f"{point.x:g}", *(f"{point.metrics[name]:.4g}" for name in names)] for point in self.points]
        return [[self.quantity, *(report.METRIC_NAMES.get(name, name.replace("_", " ")) for name in names)], *values]

    def table(self) -> str:
        """Return the points as aligned columns, for a terminal."""
        return report.align(self.rows())

    def markdown(self) -> str:
        """Return the points as a Markdown table."""
        header, *rows = self.rows()
        return report.markdown(header, rows)

    def json(self) -> dict[str, Any]:
        """Return the curve as a JSON object."""
        points = [{self.quantity: point.x} | point.metrics for point in self.points]
        return {"points": points, "settings": self.settings}

    def csv(self) -> str:
        """Return the points as comma-separated values."""
        stream = io.StringIO()
        writer = csv.writer(stream)
        writer.writerow([self.quantity, *self._metrics()])
        writer.writerows([point.x, *point.metrics.values()] for point in self.points)
        return stream.getvalue()

    def _metrics(self) -> list[str]:
        return list(self.points[0].metrics)


def measure_curve(
    quantity: str,
    values: Iterable[float],
    sample: Callable[[float], ImageSet],
    reference: ImageSet | None,
    features: str,
    metrics: Sequence[str],
    group: ProcessGroup = SINGLE_PROCESS,
) -> Curve:
    """Evaluate a model per value of a quantity.

    Args:
        quantity: its name.
        values: its values, in ascending order.
        sample: makes the set of images of a value; one set is in use at a time.
        reference: as for `ddim.evaluation.report.evaluate`.
        features: likewise.
        metrics: likewise.
        group: the processes that share the work.

    Returns:
        The curve.

    Raises:
        ValueError: for an unknown metric, sets that are too small, features that do not accept the images.
        ImportError: if torchmetrics, or what the features require, is not installed.
    """
    points, settings = [], {}
    for value in values:
        result = report.evaluate(sample(value), reference, features, metrics, group)
        points.append(CurvePoint(value, result["metrics"]))
        settings = result["settings"]
    own = ("samples", "samples_sha256")
    return Curve(quantity, points, {name: value for name, value in settings.items() if name not in own})


def check_outputs(paths: Sequence[str], name: str = "out") -> list[str]:
    """Check, before any work, that a curve can be written to paths.

    Args:
        paths: `.json`, `.csv`, `.md`, `.png` or `.svg` files.
        name: the argument's name, for the message.

    Returns:
        The paths.

    Raises:
        ValueError: for another suffix.
        OSError: if a folder does not exist or cannot be written.
        ImportError: for a plot without matplotlib.

    Example:
        >>> check_outputs([])
        []
    """
    if any(Path(path).suffix.lower() in PLOT_SUFFIXES for path in paths):
        require("a plot", "matplotlib")
    return report.check_outputs(paths, PLOT_SUFFIXES, name)


def write_curve(curve: Curve, path: Path) -> None:
    """Write a curve atomically, in the format of the path's suffix; as a plot, one panel per metric.

    Args:
        curve: the curve.
        path: a `.json`, `.csv`, `.md`, `.png` or `.svg` file.

    Raises:
        OSError: if it cannot be written; an earlier file stays.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_curve(Curve("step", [CurvePoint(1000, {"fid": 12.5})], {}), Path(folder) / "curve.csv")
        ...     (Path(folder) / "curve.csv").read_text().split()
        ['step,fid', '1000,12.5']
    """
    suffix = path.suffix.lower()
    if suffix in PLOT_SUFFIXES:
        _plot(curve, path)
        return
    texts = {".json": lambda: to_json(curve.json()), ".csv": curve.csv, ".md": curve.markdown}
    with atomic_write(path) as temporary:
        temporary.write_text(texts[suffix](), encoding="utf-8")


def _plot(curve: Curve, path: Path) -> None:
    from matplotlib.figure import Figure

    names = [name for name in curve.points[0].metrics if not name.endswith("_std")]
    figure = Figure(figsize=(6, 2.5 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), squeeze=False).flat, names, strict=True):
        xs, ys = zip(*((point.x, point.metrics[name]) for point in curve.points), strict=True)
        axes.plot(xs, ys, marker="o")
        axes.set(xlabel=curve.quantity, ylabel=report.METRIC_NAMES.get(name, name))
        axes.grid(alpha=0.3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=100)
