"""Samples compared class by class, against scikit-learn's classifier and distances of each class alone."""

from __future__ import annotations

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from ddim.data.labels import ImageLabels
from ddim.evaluation.classes import match_labels, summarize_classes
from ddim.evaluation.classifiers import DigitClassifier
from ddim.evaluation.image_sets import ImageSet, open_files, sample_image_set
from ddim.evaluation.metrics import frechet
from ddim.pipeline import DDIMPipeline

NAMES = ("a", "b", "c")


def clusters(count: int, seed: int) -> tuple[Tensor, ImageLabels]:
    """Overlapping clusters of points in four dimensions, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(3, (count,), generator=generator)
    return torch.randn(count, 4, generator=generator) + 2 * torch.eye(3, 4)[classes], ImageLabels(NAMES, classes, "")


def test_agreement_is_that_of_the_nearest_neighbor() -> None:
    (samples, labels), (reference, reference_labels) = clusters(400, 0), clusters(600, 1)
    summary = summarize_classes(None, samples, reference, labels, reference_labels)
    classifier = KNeighborsClassifier(1).fit(reference.numpy(), reference_labels.indices.numpy())
    predicted = torch.from_numpy(classifier.predict(samples.numpy()))
    agrees = (predicted == labels.indices).double()
    assert summary.metrics["agreement"] == pytest.approx(agrees.mean().item(), abs=1 / 400)
    assert 0.4 < summary.metrics["agreement"] < 0.95
    for number, name in enumerate(NAMES):
        own, real = labels.indices == number, reference_labels.indices == number
        assert summary.classes[name]["samples"] == int(own.sum())
        assert summary.classes[name]["agreement"] == pytest.approx(agrees[own].mean().item(), abs=0.02)
        assert summary.classes[name]["fid"] == pytest.approx(frechet(samples[own], reference[real]))
    mean = sum(values["fid"] for values in summary.classes.values()) / 3
    assert summary.metrics["fid_classes"] == pytest.approx(mean)
    # The reference without the image itself.
    leave_one_out = KNeighborsClassifier(2).fit(reference.numpy(), reference_labels.indices.numpy())
    others = leave_one_out.kneighbors(reference.numpy(), return_distance=False)[:, 1]
    expected = (reference_labels.indices[others] == reference_labels.indices).double().mean().item()
    assert summary.metrics["agreement_reference"] == pytest.approx(expected, abs=1 / 600)


def test_a_classifier_that_knows_the_classes_decides() -> None:
    features = torch.rand(30, 64, generator=torch.Generator().manual_seed(0))
    classifier = DigitClassifier()
    seen = classifier.attribute_logits(features)["digit"].argmax(1)
    # Names in another order than the classifier's.
    names = ("9", "3", *[digit for digit in "0124567" if int(digit) in seen], "8")
    labels = ImageLabels(names, torch.tensor([names.index(str(int(digit))) for digit in seen]), "label")
    summary = summarize_classes(classifier, features, features, labels, labels)
    assert summary.metrics["agreement"] == summary.metrics["agreement_reference"] == 1
    wrong = ImageLabels(names, (labels.indices + 1) % len(names), "label")
    assert summarize_classes(classifier, features, features, wrong, labels).metrics["agreement"] == 0


def images(name: str, *values: str) -> ImageSet:
    return ImageSet(
        *(name, (1, 1, 1), len(values), torch.zeros, False, {"label": list(values)}.get),
        label_columns=lambda: ("label",),
    )


def test_classes_are_matched_by_name_or_number() -> None:
    reference = images("real", "b", "a", "b")
    for given in (("b", "b", "a"), ("1", "1", "0")):
        labels, known = match_labels(images("samples", *given), reference)
        assert labels.names == known.names == ("a", "b")
        assert labels.indices.tolist() == [1, 1, 0]
    # Numbers that are names are these names.
    labels, _ = match_labels(images("samples", "2"), images("real", "2", "1", "0", "2"))
    assert labels.indices.tolist() == [2]
    with pytest.raises(ValueError, match=r"samples must have the classes of the reference, .*, got \['c'\]"):
        match_labels(images("samples", "a", "c"), reference)
    with pytest.raises(ValueError, match=r"classes of the reference: empty has no labels"):
        match_labels(reference, ImageSet("empty", (1, 1, 1), 1, torch.zeros, False))


def test_sets_have_labels() -> None:
    assert open_files("digits", 5).read_column("label") == ["0", "1", "2", "3", "4"]
    assert sample_image_set(DDIMPipeline.from_pretrained("mnist"), 3).label_columns() == ()
