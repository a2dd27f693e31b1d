"""Small classifiers that come with the package: they judge samples by the attributes of what is shown.

    mnist    handwritten digits, 28x28, grayscale     one attribute, the digit
    faces    drawn faces, 64x64, color                ten attributes, from the mouth to the color of the clothes

Their features serve for distances, their attributes for frequencies (`ddim.evaluation.attributes`). Distances on the
features of one are comparable only with each other. `scripts/classifier.py` trains both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.io.weights import fill_model

FACE_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "mouth": ("agape", "angry", "laugh", "sad", "smile"),
    "eyes": ("bow", "happy", "humble", "wide", "wink"),
    "eyebrows": ("angry", "happy", "neutral", "raised", "sad"),
    "hair": ("bun", "sideComed", "spiky", "undercut"),
    "hairColor": ("#2c1b18", "#724133", "#a55728", "#b58143", "#d6b370"),
    "rearHair": ("none", "longStraight", "longWavy", "neckHigh", "shoulderHigh"),
    "beard": ("none", "chin", "chinMoustache", "fullBeard", "longBeard", "moustacheTwirl"),
    "skinColor": ("#5c3829", "#a36b4f", "#b98e6a", "#c68e7a", "#f1c3a5"),
    "clothes": ("dress", "openJacket", "shirt", "tShirt", "turtleNeck"),
    "clothesColor": (
        *("#0b3286", "#147f3c", "#151613", "#545454", "#731ac3"),
        *("#b11f1f", "#e8e9e6", "#eab308", "#ec4899", "#f97316"),
    ),
}
"""The attributes of the drawn faces and their values, under the names of the data set (`scripts/faces`)."""


@runtime_checkable
class AttributeClassifier(Protocol):
    """A feature extractor that recognizes attributes of an image, each of which has one of several values.

    Attributes:
        attributes: the values of each attribute.
    """

    attributes: Mapping[str, Sequence[str]]

    def attribute_logits(self, features: Tensor) -> dict[str, Tensor]:
        """Map features (N, D) to logits (N, number of values) of each attribute."""
        ...


class DigitClassifier(nn.Module):
    """A small classifier of handwritten digits, 28x28 grayscale, with 64 features, for the built-in model.

    Example:
        >>> classifier = DigitClassifier()
        >>> features = classifier(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
        >>> features.shape, classifier.logits(features).shape
        (torch.Size([2, 64]), torch.Size([2, 10]))
    """

    shape = (1, 28, 28)
    num_features = 64
    attributes: ClassVar[dict[str, tuple[str, ...]]] = {"digit": tuple("0123456789")}

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.hidden, self.classes = nn.Linear(32 * 7 * 7, self.num_features), nn.Linear(self.num_features, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (N, 1, 28, 28) to float32 (N, 64)."""
        x = images.float() / 255
        for conv in (self.conv1, self.conv2):
            x = F.max_pool2d(conv(x).relu(), 2)
        hidden: Tensor = self.hidden(x.flatten(1))
        return hidden.relu()

    def logits(self, features: Tensor) -> Tensor:
        """Map features (N, 64) to logits (N, 10)."""
        result: Tensor = self.classes(features.float())
        return result

    def attribute_logits(self, features: Tensor) -> dict[str, Tensor]:
        """Map features (N, 64) to the logits (N, 10) of the digit."""
        return {"digit": self.logits(features)}


class FaceClassifier(nn.Module):
    """A small classifier of drawn faces, 64x64 in color, with 64 features and ten attributes.

    Example:
        >>> classifier = FaceClassifier()
        >>> features = classifier(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
        >>> features.shape, classifier.attribute_logits(features)["hair"].shape
        (torch.Size([2, 64]), torch.Size([2, 4]))
    """

    shape = (3, 64, 64)
    num_features = 64
    attributes: ClassVar[dict[str, tuple[str, ...]]] = FACE_ATTRIBUTES

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 32, 64, 96, 96)
        self.convs = nn.ModuleList(nn.Conv2d(before, after, 3, 2, padding=1) for before, after in pairwise(channels))
        self.hidden = nn.Linear(96 * 4 * 4, self.num_features)
        # The heads of all attributes, side by side.
        self.heads = nn.Linear(self.num_features, sum(map(len, self.attributes.values())))

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (N, 3, 64, 64) to float32 (N, 64)."""
        x = images.float() / 127.5 - 1
        for conv in self.convs:
            x = conv(x).relu()
        hidden: Tensor = self.hidden(x.flatten(1))
        return hidden.relu()

    def attribute_logits(self, features: Tensor) -> dict[str, Tensor]:
        """Map features (N, 64) to logits (N, number of values) of each attribute."""
        sizes = [len(values) for values in self.attributes.values()]
        return dict(zip(self.attributes, self.heads(features.float()).split(sizes, 1), strict=True))


CLASSIFIERS: dict[str, type[DigitClassifier | FaceClassifier]] = {"mnist": DigitClassifier, "faces": FaceClassifier}
"""By the names under which their features are chosen."""


def classifier_path(name: str) -> Path:
    """Return the file of a classifier's weights.

    Args:
        name: among `CLASSIFIERS`.

    Example:
        >>> classifier_path("mnist").name
        'mnist_classifier.safetensors'
    """
    return Path(__file__).with_name(f"{name}_classifier.safetensors")


def load_classifier(name: str, shape: tuple[int, int, int]) -> DigitClassifier | FaceClassifier:
    """Load a classifier that comes with the package, in evaluation mode.

    Args:
        name: among `CLASSIFIERS`.
        shape: (C, H, W) of the images.

    Returns:
        The classifier, float32.

    Raises:
        ValueError: if it does not accept such images, or its weights are damaged.

    Example:
        >>> load_classifier("mnist", (1, 28, 28)).num_features
        64
    """
    from safetensors.torch import load_file

    expected = CLASSIFIERS[name].shape
    if shape != expected:
        channels, height, width = expected
        kind = "grayscale" if channels == 1 else "color"
        raise ValueError(
            f"features={name!r} requires {kind} images of {width}x{height}: expected shape {expected}, got {shape}; "
            "choose pixels or inception"
        )
    with torch.device("meta"):
        classifier = CLASSIFIERS[name]()
    path = classifier_path(name)
    fill_model(classifier, load_file(path), path.name, torch.float32)
    return classifier.eval()
