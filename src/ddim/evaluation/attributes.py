"""Attributes of images, as a classifier recognizes them: how frequent each value is, and how sure the classifier is.

    frequency      the share of the images whose most probable value this is
    confident      the share of the images for which every attribute has a value of probability above 0.9: samples that
                   show nothing recognizable, or something between two values, lower it
    accuracy       the share of the reference's images with a known label whose value is recognized, where the data set
                   has labels

The classifier errs, and is less sure of hidden attributes, on real images as well: samples are compared with what it
makes of the reference, not with labels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ddim.data.base import canonical_value
from ddim.evaluation.classifiers import AttributeClassifier
from ddim.evaluation.image_sets import ImageSet
from ddim.validation import shown

logger = logging.getLogger(__name__)

CONFIDENT = 0.9
"""A probability above which a value is recognized with confidence."""


@dataclass(frozen=True)
class AttributeSummary:
    """The attributes of samples beside those of a reference.

    Attributes:
        metrics: `confident` and `confident_reference`, shares of the images; `confident_ratio`, unless the latter is 0;
            `largest_difference` of a frequency, in percentage points; `accuracy_NAME` on the reference for each
            attribute with known labels.
        frequencies: for each attribute and value the shares of the `samples` and of the `reference`.

    Example:
        >>> AttributeSummary({"confident": 1.0}, {"digit": {"0": {"samples": 0.1, "reference": 0.1}}}).metrics
        {'confident': 1.0}
    """

    metrics: dict[str, float]
    frequencies: dict[str, dict[str, dict[str, float]]]


@torch.no_grad()
def summarize_attributes(
    classifier: AttributeClassifier, samples: Tensor, reference: Tensor, labels: Mapping[str, Tensor]
) -> AttributeSummary:
    """Compare the attributes of samples with those of a reference.

    Args:
        classifier: recognizes attributes.
        samples: its features (N, D) of the samples.
        reference: its features (M, D) of the reference.
        labels: true values of the reference, as `read_labels` returns them.

    Returns:
        The comparison.

    Example:
        >>> from ddim.evaluation.classifiers import DigitClassifier
        >>> features = torch.rand(20, 64, generator=torch.Generator().manual_seed(0))
        >>> summarize_attributes(DigitClassifier(), features, features, {}).metrics["largest_difference"]
        0.0
    """
    probabilities = {
        role: {name: logits.softmax(1) for name, logits in classifier.attribute_logits(features).items()}
        for role, features in (("samples", samples), ("reference", reference))
    }
    frequencies: dict[str, dict[str, dict[str, float]]] = {
        name: {value: {} for value in values} for name, values in classifier.attributes.items()
    }
    confident = {}
    for role, attributes in probabilities.items():
        least = torch.stack([probability.amax(1) for probability in attributes.values()]).amin(0)
        confident[role] = float((least > CONFIDENT).double().mean())
        for name, probability in attributes.items():
            values = classifier.attributes[name]
            counts = probability.argmax(1).bincount(minlength=len(values)).tolist()
            for value, count in zip(values, counts, strict=True):
                frequencies[name][value][role] = count / len(probability)
    shares = [share for values in frequencies.values() for share in values.values()]
    metrics = {"confident": confident["samples"], "confident_reference": confident["reference"]}
    if confident["reference"]:
        metrics["confident_ratio"] = confident["samples"] / confident["reference"]
    metrics["largest_difference"] = 100 * max(abs(share["samples"] - share["reference"]) for share in shares)
    for name, indices in labels.items():
        known = indices >= 0
        if known.any():
            predicted = probabilities["reference"][name].argmax(1)
            metrics[f"accuracy_{name}"] = float((predicted == indices)[known].double().mean())
    return AttributeSummary(metrics, frequencies)


def read_labels(images: ImageSet, classifier: AttributeClassifier) -> dict[str, Tensor]:
    """Read the true values of attributes from the columns of a data set.

    A column has the name of its attribute; that of a classifier's only attribute may also be called `label`. Values
    that the classifier does not know, and missing ones, are reported.

    Args:
        images: the set.
        classifier: its attributes are looked for.

    Returns:
        For each attribute that has a column, the indices of the images' values, int64 (N,); -1 for a value that the
        classifier does not know.

    Example:
        >>> from ddim.evaluation.classifiers import DigitClassifier
        >>> columns = {"label": ["7", "x"]}
        >>> read_labels(ImageSet("two", (1, 28, 28), 2, torch.zeros, True, columns.get), DigitClassifier())
        {'digit': tensor([ 7, -1])}
    """
    labels = {}
    for name, values in classifier.attributes.items():
        column_names = (name, "label") if len(classifier.attributes) == 1 else (name,)
        columns = map(images.read_column, column_names)
        if (column := next((column for column in columns if column is not None), None)) is not None:
            indices = {value: index for index, value in enumerate(values)}
            canonical = {canonical_value(value): index for value, index in indices.items()}
            label_indices = [indices.get(value, canonical.get(canonical_value(value), -1)) for value in column]
            if unknown := [value for value, index in zip(column, label_indices, strict=True) if index < 0]:
                logger.warning(
                    "accuracy_%s leaves out %d of %d images, whose labels are not among %s: %s",
                    *(name, len(unknown), len(column), shown(list(values)), shown(sorted(set(unknown)))),
                )
            labels[name] = torch.tensor(label_indices)
    return labels
