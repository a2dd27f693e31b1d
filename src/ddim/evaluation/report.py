"""Reports of an evaluation, with everything that changes its numbers: a table, JSON, CSV, Markdown."""

from __future__ import annotations

import csv
import io
import logging
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ddim.distributed import SINGLE_PROCESS, ProcessGroup
from ddim.evaluation.attributes import read_labels, summarize_attributes
from ddim.evaluation.classes import match_labels, summarize_classes
from ddim.evaluation.classifiers import CLASSIFIERS, AttributeClassifier
from ddim.evaluation.features import extractor_id, load_features
from ddim.evaluation.image_sets import ImageSet
from ddim.evaluation.metrics import check_metrics, compute_features, measure, sample_size_warning
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
    "confident": "confident samples",
    "confident_reference": "confident reference",
    "confident_ratio": "their ratio",
    "largest_difference": "largest difference, points",
    "agreement": "samples of their class",
    "agreement_reference": "reference of its class",
    "fid_classes": "Fréchet distance, mean of classes",
    "samples_min": "samples, minimum",
    "samples_p1": "samples, 1st percentile",
    "samples_p5": "samples, 5th percentile",
    "samples_p50": "samples, median",
    "held_out_min": "held-out, minimum",
    "held_out_p1": "held-out, 1st percentile",
    "held_out_p5": "held-out, 5th percentile",
    "held_out_p50": "held-out, median",
    "copies": "samples that are copies",
    "nearer_than_held_out": "samples below held-out minimum",
    "nearer_than_held_out_p1": "samples below its 1st percentile",
    "mann_whitney_z": "Mann-Whitney Z",
}
"""Of the metrics of all reports; others are shown by their keys."""
REPORT_SUFFIXES = {".json": "", ".csv": "", ".md": "Markdown"}
FEATURES_WITH_LOGITS = ("mnist", "inception")
ATTRIBUTE_COLUMNS = ("attribute", "value", "samples", "reference", "difference")
CLASS_COLUMNS = ("class", "samples", "reference", "agreement", "Fréchet distance")
MAX_HASH_LENGTH = 16
"""Digits of a SHA-256 that tables show."""


def check_outputs(paths: Sequence[str], others: Mapping[str, str] | None = None, name: str = "out") -> list[str]:
    """Check, before any work, that reports can be written to paths.

    Args:
        paths: `.json`, `.csv` or `.md` files.
        others: further suffixes that are allowed, and what they mean.
        name: the argument's name, for the message.

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
        check_output_path(path, REPORT_SUFFIXES | dict(others or {}), folder_allowed=False, name=name)
    return list(paths)


def evaluate(
    samples: ImageSet,
    reference: ImageSet | None,
    features: str,
    metrics: Sequence[str],
    group: ProcessGroup = SINGLE_PROCESS,
    attributes: bool = False,
    per_class: bool = False,
) -> dict[str, Any]:
    """Compute metrics of a set of images, and describe how.

    Args:
        samples: the images to evaluate.
        reference: the images to compare with; `None` if the inception score is the only metric.
        features: `pixels`, `mnist`, `faces`, `inception`, or a TorchScript file.
        metrics: names among `ddim.evaluation.metrics.METRICS`.
        group: the processes that share the work.
        attributes: whether to report attributes (`ddim.evaluation.attributes`), which requires features that recognize
            some, `mnist` or `faces`.
        per_class: whether to report each class (`ddim.evaluation.classes`), which requires labels of both sets.

    Returns:
        `{"metrics": {...}, "settings": {...}}`, with `attributes` also `{"attributes": {...}}`, and with `per_class`
        also `{"classes": {...}}`.

    Raises:
        ValueError: for an unknown metric, sets that are too small, features that do not accept the images or do not
            recognize attributes.
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
    if attributes and reference is None:
        raise ValueError("reference must be given for attributes=True, got None")
    if per_class and reference is None:
        raise ValueError("reference must be given for per_class=True, got None")
    labels = match_labels(samples, reference) if per_class and reference is not None else None
    extractor: Any = load_features(features, samples.shape, samples.pixel_format)
    if attributes and not isinstance(extractor, AttributeClassifier):
        raise ValueError(f"features must be {' or '.join(CLASSIFIERS)} for attributes=True, got {shown(features)}")
    counts = [images.count for images in (samples, reference) if images is not None]
    if group.is_main and "fid" in metrics and (warning := sample_size_warning(extractor, *counts)):
        logger.warning(warning)
    sample_features = compute_features(samples, extractor, group)
    reference_features = None if reference is None else compute_features(reference, extractor, group)
    with torch.no_grad():
        logits = extractor.logits(sample_features.values) if "is" in metrics else None
    settings = describe_set("samples", samples, sample_features.sha256)
    settings |= describe_set("reference", reference, None if reference_features is None else reference_features.sha256)
    if group.is_main and reference_features and reference_features.sha256 == sample_features.sha256:
        logger.warning("the samples and the reference are the same images: the metrics compare them with themselves")
    settings |= describe_method(samples.shape, extractor_id(extractor), ("torch", "torchmetrics", "pillow"))
    reference_values = None if reference_features is None else reference_features.values
    result: dict[str, Any] = {"metrics": measure(sample_features.values, reference_values, metrics, logits)}
    if attributes and reference is not None and reference_values is not None:
        summary = summarize_attributes(
            extractor, sample_features.values, reference_values, read_labels(reference, extractor)
        )
        result["metrics"] |= summary.metrics
        result["attributes"] = summary.frequencies
    if labels is not None and reference_values is not None:
        classes = summarize_classes(extractor, sample_features.values, reference_values, *labels)
        result["metrics"] |= classes.metrics
        result["classes"] = classes.classes
    return result | {"settings": settings}


def describe_set(role: str, images: ImageSet | None, sha256: str | None) -> dict[str, Any]:
    """Describe a set of images, for the settings of a report.

    Args:
        role: `samples`, `reference`, ...
        images: the set; `None` where there is none.
        sha256: the hash of its pixels.

    Returns:
        Its name, number of images and hash.

    Example:
        >>> describe_set("reference", None, None)
        {'reference': None, 'reference_count': None, 'reference_sha256': None}
    """
    name, count = (None, None) if images is None else (images.name, images.count)
    return {role: name, f"{role}_count": count, f"{role}_sha256": sha256}


def describe_method(
    shape: tuple[int, int, int], features: str, packages: Sequence[str] = ("torch", "pillow")
) -> dict[str, Any]:
    """Describe how images are compared, for the settings of a report.

    Args:
        shape: (C, H, W) of the images.
        features: the identifier of the features.
        packages: installed packages on which the numbers depend.

    Returns:
        The shape, how images are fitted to it, the features, and the packages' versions.

    Example:
        >>> describe_method((1, 28, 28), "pixels")["image_shape"]
        [1, 28, 28]
    """
    return {
        "image_shape": list(shape),
        "fitting": "center crop, Lanczos, where images are of another size",
        "features": features,
        "versions": {"ddim": __version__, "python": platform.python_version()}
        | {name: version(name) for name in packages},
    }


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
    tables = [align(_rows(result))]
    if "attributes" in result:
        tables.append(align([ATTRIBUTE_COLUMNS, *_attribute_rows(result["attributes"])]))
    if "classes" in result:
        tables.append(align([CLASS_COLUMNS, *_class_rows(result["classes"])]))
    return "\n\n".join(tables)


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
        frequencies = {
            f"{role}_{attribute}_{value}": fractions[role]
            for attribute, values in result.get("attributes", {}).items()
            for value, fractions in values.items()
            for role in ("samples", "reference")
        }
        by_class = {
            f"{metric}_class_{name}": value
            for name, values in result.get("classes", {}).items()
            for metric, value in values.items()
        }
        columns = result["metrics"] | frequencies | by_class | scalars
        stream = io.StringIO()
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerow(columns.values())
        text = stream.getvalue()
    else:
        text = markdown(("", ""), _rows(result))
        if "attributes" in result:
            text += "\n" + markdown(ATTRIBUTE_COLUMNS, _attribute_rows(result["attributes"]))
        if "classes" in result:
            text += "\n" + markdown(CLASS_COLUMNS, _class_rows(result["classes"]))
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the names and values of a report as text."""
    values = result["metrics"]
    rows = []
    for name, value in values.items():
        if name.endswith("_std"):
            continue
        deviation = f" ± {values[f'{name}_std']:.2g}" if f"{name}_std" in values else ""
        text = str(value) if isinstance(value, int) else f"{value:.4g}"
        rows.append((METRIC_NAMES.get(name, name.replace("_", " ")), f"{text}{deviation}"))
    for key, value in result["settings"].items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {entry}" for name, entry in value.items())
        if value is not None:
            text = str(value)
            rows.append((key, f"{text[:MAX_HASH_LENGTH]}..." if key.endswith("sha256") else text))
    return rows


def _attribute_rows(attributes: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the frequencies of all values as text, in percent; differences in points."""
    rows: list[tuple[str, ...]] = []
    for attribute, values in attributes.items():
        for value, fractions in values.items():
            samples, reference = 100 * fractions["samples"], 100 * fractions["reference"]
            rows.append((attribute, value, f"{samples:.1f}%", f"{reference:.1f}%", f"{samples - reference:+.1f}"))
    return rows


def _class_rows(classes: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    """Return the metrics of all classes as text."""
    return [
        (
            *(name, f"{values['samples']}", f"{values['reference']}", f"{values['agreement']:.1%}"),
            f"{values['fid']:.4g}" if "fid" in values else "",
        )
        for name, values in classes.items()
    ]


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines whose columns are aligned.

    Args:
        rows: cells, equally many per row.

    Example:
        >>> print(align([["step", "fid"], ["1000", "30"]]))
        step  fid
        1000  30
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown.

    Args:
        header: names of the columns.
        rows: cells, one per column.

    Example:
        >>> print(markdown(["step", "fid"], [["1000", "30"]]), end="")
        | step | fid |
        | --- | --- |
        | 1000 | 30 |
    """
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"
