"""Reports of an evaluation, with everything that changes its numbers: a table, JSON, CSV, Markdown."""

from __future__ import annotations

import csv
import io
import logging
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ddim.distributed import SINGLE_PROCESS, ProcessGroup
from ddim.evaluation.features import extractor_id, load_features
from ddim.evaluation.image_sets import ImageSet
from ddim.evaluation.metrics import METRICS, check_metrics, compute_features, measure, sample_size_warning
from ddim.extras import require
from ddim.io.atomic import atomic_write
from ddim.io.image_files import check_output_path
from ddim.io.json_files import to_json
from ddim.validation import shown
from ddim.version import __version__

logger = logging.getLogger(__name__)

METRIC_NAMES = {
    "fid": "Fréchet distance",
    "kid": "kernel distance",
    "is": "inception score",
    "precision": "precision",
    "recall": "recall",
}
REPORT_SUFFIXES = {".json": "", ".csv": "", ".md": "Markdown"}
FEATURES_WITH_LOGITS = ("mnist", "inception")
MAX_HASH_LENGTH = 16
"""Digits of a SHA-256 that tables show."""


def check_outputs(paths: Sequence[str]) -> list[str]:
    """Check, before any work, that reports can be written to paths.

    Args:
        paths: `.json`, `.csv` or `.md` files.

    Returns:
        The paths.

    Raises:
        ValueError: for another suffix.
        OSError: if a folder does not exist or cannot be written.

    Example:
        >>> check_outputs(["score.txt"])
        Traceback (most recent call last):
        ValueError: out must end in .json, .csv, or .md (Markdown), got 'score.txt'
    """
    for path in paths:
        check_output_path(path, REPORT_SUFFIXES, folder_allowed=False)
    return list(paths)


def evaluate(
    samples: ImageSet,
    reference: ImageSet | None,
    features: str,
    metrics: Sequence[str],
    group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Compute metrics of a set of images, and describe how.

    Args:
        samples: the images to evaluate.
        reference: the images to compare with; `None` if the inception score is the only metric.
        features: `pixels`, `mnist`, `inception`, or a TorchScript file.
        metrics: names among `ddim.evaluation.metrics.METRICS`.
        group: the processes that share the work.

    Returns:
        `{"metrics": {...}, "settings": {...}}`.

    Raises:
        ValueError: for an unknown metric, sets that are too small, or features that do not accept the images.
        ImportError: if torchmetrics, or what the features require, is not installed.

    Example:
        >>> pixels = torch.arange(32, dtype=torch.uint8).view(8, 1, 2, 2)
        >>> images = ImageSet("ramp", (1, 2, 2), 8, lambda number: pixels, from_files=False)
        >>> evaluate(images, images, "pixels", ["precision"])["metrics"]
        {'precision': 1.0}
    """
    require("evaluation", "torchmetrics")
    check_metrics(metrics, reference is not None)
    if "is" in metrics and features not in FEATURES_WITH_LOGITS:
        raise ValueError(
            f"features must be {' or '.join(FEATURES_WITH_LOGITS)} for the inception score, got {shown(features)}"
        )
    extractor: Any = load_features(features, samples.shape)
    counts = [images.count for images in (samples, reference) if images is not None]
    if group.is_main and "fid" in metrics and (warning := sample_size_warning(extractor, *counts)):
        logger.warning(warning)
    sample_features = compute_features(samples, extractor, group)
    reference_features = None if reference is None else compute_features(reference, extractor, group)
    with torch.no_grad():
        logits = extractor.logits(sample_features.values) if "is" in metrics else None
    settings: dict[str, Any] = {
        "samples": samples.name,
        "samples_count": samples.count,
        "samples_sha256": sample_features.sha256,
        "reference": None if reference is None else reference.name,
        "reference_count": None if reference is None else reference.count,
        "reference_sha256": None if reference_features is None else reference_features.sha256,
        "image_shape": list(samples.shape),
        "fitting": "center crop, Lanczos, where images are of another size",
        "features": extractor_id(extractor),
        "versions": {"ddim": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "torchmetrics", "pillow")},
    }
    reference_values = None if reference_features is None else reference_features.values
    return {"metrics": measure(sample_features.values, reference_values, metrics, logits), "settings": settings}


def format_table(result: dict[str, Any]) -> str:
    """Return a report as aligned columns, for a terminal.

    Args:
        result: what `evaluate` returns.

    Returns:
        Lines of a name and a value.

    Example:
        >>> print(format_table({"metrics": {"fid": 12.3456}, "settings": {"samples_count": 100}}))
        Fréchet distance  12.35
        samples_count     100
    """
    rows = _rows(result)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def write_report(result: dict[str, Any], path: Path) -> None:
    """Write a report atomically, in the format of the path's suffix.

    Args:
        result: what `evaluate` returns.
        path: a `.json` file, a `.csv` file (a line of names and a line of values), or a `.md` file.

    Raises:
        OSError: if it cannot be written; an earlier file stays.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "score.md"
        ...     write_report({"metrics": {"fid": 12.3456}, "settings": {}}, path)
        ...     print(path.read_text().splitlines()[-1])
        | Fréchet distance | 12.35 |
    """
    if path.suffix.lower() == ".json":
        text = to_json(result)
    elif path.suffix.lower() == ".csv":
        scalars = {name: value for name, value in result["settings"].items() if not isinstance(value, dict | list)}
        columns = result["metrics"] | scalars
        stream = io.StringIO()
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerow(columns.values())
        text = stream.getvalue()
    else:
        rows = "".join(f"| {name} | {value} |\n" for name, value in _rows(result))
        text = f"| | |\n|---|---|\n{rows}"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the names and values of a report as text."""
    values = result["metrics"]
    rows = []
    for name in METRICS:
        if name in values:
            deviation = f" ± {values[f'{name}_std']:.2g}" if f"{name}_std" in values else ""
            rows.append((METRIC_NAMES[name], f"{values[name]:.4g}{deviation}"))
    for key, value in result["settings"].items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {entry}" for name, entry in value.items())
        if value is not None:
            text = str(value)
            rows.append((key, f"{text[:MAX_HASH_LENGTH]}..." if key.endswith("sha256") else text))
    return rows
