"""What an evaluation found, with everything that changes its numbers, as a table, JSON, CSV and Markdown."""

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
from ddim.evaluation.features import identity, load_features
from ddim.evaluation.image_sets import ImageSet
from ddim.evaluation.metrics import METRICS, Features, compute_features, measure, shortage
from ddim.io.atomic import atomic_write
from ddim.io.image_files import check_output_path
from ddim.io.json_files import to_json
from ddim.version import __version__

logger = logging.getLogger(__name__)

NAMES = {
    "fid": "Fréchet distance",
    "kid": "kernel distance",
    "is": "inception score",
    "precision": "precision",
    "recall": "recall",
}
SUFFIXES = {".json": "", ".csv": "", ".md": "Markdown"}


def check_outputs(paths: Sequence[str]) -> list[str]:
    """The paths, after seeing that all can be written; errors as `ddim.io.images.check_output_path`."""
    for path in paths:
        check_output_path(path, SUFFIXES, folder_allowed=False)
    return list(paths)


def describe(
    samples: ImageSet,
    reference: ImageSet | None,
    features: str,
    metrics: Sequence[str],
    group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Compare two sets.

    Args:
        samples: what is judged.
        reference: what it is compared with.
        features: as for `load_features`.
        metrics: of `METRICS`.
        group: the processes that share the work.

    Returns:
        `{"metrics": {...}, "settings": {...}}`.

    Raises:
        ValueError: for unknown metrics, sets that are too small, or features that do not fit.
    """
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"there is no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
    if set(metrics) - {"is"} and reference is None:
        raise ValueError("give a --reference to compare with; only the inception score does without")
    if "is" in metrics and features not in ("mnist", "inception"):
        raise ValueError("the inception score needs features that tell classes: mnist or inception")
    extractor: Any = load_features(features, samples.shape)
    counts = [s.count for s in (samples, reference) if s is not None]
    if group.is_main and "fid" in metrics and (reason := shortage(extractor, *counts)):
        logger.warning(reason)
    found = compute_features(samples, extractor, group)
    other: Features | None = None if reference is None else compute_features(reference, extractor, group)
    with torch.no_grad():
        logits = extractor.logits(found.values) if "is" in metrics else None
    settings: dict[str, Any] = {
        "samples": samples.name,
        "samples_count": samples.count,
        "samples_sha256": found.sha256,
        "reference": None if reference is None else reference.name,
        "reference_count": None if reference is None else reference.count,
        "reference_sha256": None if other is None else other.sha256,
        "image_shape": list(samples.shape),
        "fitting": "centre crop, Lanczos, where images are of another size",
        "features": identity(extractor),
        "versions": {"ddim": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "torchmetrics", "pillow")},
    }
    values = measure(found.values, None if other is None else other.values, metrics, logits)
    return {"metrics": values, "settings": settings}


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    values = result["metrics"]
    rows = []
    for name in METRICS:
        if name in values:
            deviation = f" ± {values[f'{name}_std']:.2g}" if f"{name}_std" in values else ""
            rows.append((NAMES[name], f"{values[name]:.4g}{deviation}"))
    for key, value in result["settings"].items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {entry}" for name, entry in value.items())
        if value is not None:
            text = str(value)
            rows.append((key, f"{text[:16]}..." if key.endswith("sha256") else text))
    return rows


def table(result: dict[str, Any]) -> str:
    """Aligned columns, for a terminal."""
    rows = _rows(result)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def write(result: dict[str, Any], path: Path) -> None:
    """To a file, by its suffix: .json, .csv (one line of values under one of names) or .md."""
    if path.suffix.lower() == ".json":
        text = to_json(result)
    elif path.suffix.lower() == ".csv":
        flat = result["metrics"] | {k: v for k, v in result["settings"].items() if not isinstance(v, dict | list)}
        stream = io.StringIO()
        writer = csv.writer(stream)
        writer.writerow(flat)
        writer.writerow(flat.values())
        text = stream.getvalue()
    else:
        rows = "".join(f"| {name} | {value} |\n" for name, value in _rows(result))
        text = f"| | |\n|---|---|\n{rows}"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
