"""Samples of a model with classes, class by class: do they show their class, and are they distributed as its images?

    agreement      the share of the samples that a classifier recognizes as the class that they were sampled for: the
                   classifier of the features where they have one of these classes, else the nearest image of the
                   reference
    fid            the Fréchet distance of the samples of a class to the images of that class, and its mean over classes

The classifier errs on real images as well: the agreement of the reference, each image without itself, is given beside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddim.data.labels import AUTO, ImageLabels, LabeledCollection, read_labels
from ddim.evaluation.classifiers import AttributeClassifier
from ddim.evaluation.metrics import frechet
from ddim.validation import shown

MIN_FRECHET_IMAGES = 2
CHUNK_ROWS = 256


@dataclass(frozen=True)
class ClassSummary:
    """The classes of samples beside those of a reference.

    Attributes:
        metrics: `agreement` of the samples, `agreement_reference`, and `fid_classes`, the mean of the distances.
        classes: for each class the numbers of `samples` and of `reference` images, `agreement`, and `fid`; what cannot
            be computed, of fewer than two images, is left out.

    Example:
        >>> ClassSummary({"agreement": 1.0}, {"cat": {"samples": 5, "reference": 9, "agreement": 1.0}}).metrics
        {'agreement': 1.0}
    """

    metrics: dict[str, float]
    classes: dict[str, dict[str, float]]


def match_labels(
    samples: LabeledCollection, reference: LabeledCollection, column: str = AUTO
) -> tuple[ImageLabels, ImageLabels]:
    """Read the classes of samples and of a reference, as indices of the same classes.

    Samples that `ddim sample` wrote hold indices, which are those of the reference's classes.

    Args:
        samples: the samples.
        reference: the images of the data.
        column: of the reference's labels.

    Returns:
        The labels of both, with the names of the reference's classes.

    Raises:
        ValueError: if one has no labels, or the samples have classes that the reference does not have.

    Example:
        >>> from ddim.data.base import Source
        >>> def images(*labels):
        ...     return Source("x", len(labels), list, "", {"label": list(labels)}.get, label_columns=lambda: ("label",))
        >>> match_labels(images("1", "0", "1"), images("cat", "cat", "dog"))[0].indices
        tensor([1, 0, 1])
    """
    known = read_labels(reference, column, "classes of the reference", min_classes=1)
    given = read_labels(samples, AUTO, "classes of the samples", min_classes=1)
    assert known is not None
    assert given is not None
    index = {name: number for number, name in enumerate(known.names)}
    if not set(given.names) <= index.keys():
        index |= {str(number): number for number in range(len(known.names))}
    if unknown := [name for name in given.names if name not in index]:
        raise ValueError(
            f"samples must have the classes of the reference, {shown(list(known.names))}, got {shown(unknown)}"
        )
    rows = torch.tensor([index[name] for name in given.names])
    return ImageLabels(known.names, rows[given.indices], given.column), known


@torch.no_grad()
def summarize_classes(
    extractor: Any, samples: Tensor, reference: Tensor, labels: ImageLabels, reference_labels: ImageLabels
) -> ClassSummary:
    """Compare samples with a reference class by class.

    Args:
        extractor: the features; one that recognizes the classes is the classifier.
        samples: features (N, D) of the samples.
        reference: features (M, D) of the reference.
        labels: classes of the N samples.
        reference_labels: classes of the M images, with the same names.

    Returns:
        The comparison.

    Example:
        >>> features = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
        >>> labels = ImageLabels(("low", "high"), torch.tensor([0, 0, 1, 1]), "label")
        >>> summarize_classes(None, features + 0.01, features, labels, labels).metrics["agreement"]
        1.0
    """
    recognized, recognized_reference = _recognize(extractor, samples, reference, reference_labels)
    agrees = (recognized == labels.indices).double()
    metrics = {
        "agreement": float(agrees.mean()),
        "agreement_reference": float((recognized_reference == reference_labels.indices).double().mean()),
    }
    classes: dict[str, dict[str, float]] = {}
    for number, name in enumerate(labels.names):
        own, real = labels.indices == number, reference_labels.indices == number
        if not own.any():
            continue
        row: dict[str, float] = {"samples": int(own.sum()), "reference": int(real.sum())}
        row["agreement"] = float(agrees[own].mean())
        if min(row["samples"], row["reference"]) >= MIN_FRECHET_IMAGES:
            row["fid"] = frechet(samples[own], reference[real])
        classes[name] = row
    distances = [row["fid"] for row in classes.values() if "fid" in row]
    if distances:
        metrics["fid_classes"] = sum(distances) / len(distances)
    return ClassSummary(metrics, classes)


def _recognize(
    extractor: Any, samples: Tensor, reference: Tensor, reference_labels: ImageLabels
) -> tuple[Tensor, Tensor]:
    """Return the classes that a classifier sees in samples and in the reference; -1 for those of no class."""
    if isinstance(extractor, AttributeClassifier):
        for name, values in extractor.attributes.items():
            if set(reference_labels.names) <= set(values):
                index = torch.tensor(
                    [reference_labels.names.index(v) if v in reference_labels.names else -1 for v in values]
                )
                logits = (extractor.attribute_logits(features)[name] for features in (samples, reference))
                seen, seen_reference = (index[each.argmax(1).cpu()] for each in logits)
                return seen, seen_reference
    classes = reference_labels.indices
    return classes[_nearest(samples, reference)], classes[_nearest(reference, reference, leave_out=True)]


def _nearest(points: Tensor, others: Tensor, leave_out: bool = False) -> Tensor:
    """Return the nearest of the others to each point, without the point itself where they are the same."""
    found = []
    for first in range(0, len(points), CHUNK_ROWS):
        distances = torch.cdist(points[first : first + CHUNK_ROWS], others)
        if leave_out:
            distances[torch.arange(len(distances)), torch.arange(first, first + len(distances))] = torch.inf
        found.append(distances.argmin(1).cpu())
    return torch.cat(found)
