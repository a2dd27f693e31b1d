"""Features: networks, or simpler functions, from images to vectors, on whose distribution sets of images are compared.

A feature extractor is a module that takes uint8 (N, C, H, W) and returns float (N, D), with an attribute
`num_features`, D. One that classifies has `logits` besides, (N, D) features to (N, classes).
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.io.weights import digest, fill_model

CLASSIFIER = Path(__file__).with_name("mnist_classifier.safetensors")


class Pixels(nn.Module):
    """The pixels themselves, in [0, 1]: no network, no download. Distances tell means and covariances of pixels apart,
    and not what a picture shows.

    Args:
        shape: (C, H, W) of the images.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        self.num_features = channels * height * width

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) to float64 (N, C H W)."""
        return images.flatten(1).double() / 255


class DigitClassifier(nn.Module):
    """A small classifier of handwritten digits, 28x28 and grey, for judging the built-in model: 64 features.

    `scripts/classifier.py` trains it. Distances on its features compare with nobody else's.
    """

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.hidden, self.classes = nn.Linear(32 * 7 * 7, self.num_features), nn.Linear(self.num_features, 10)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, 1, 28, 28) to float32 (N, 64)."""
        x = images.float() / 255
        for conv in (self.conv1, self.conv2):
            x = F.max_pool2d(conv(x).relu(), 2)
        hidden: Tensor = self.hidden(x.flatten(1))
        return hidden.relu()

    def logits(self, features: Tensor) -> Tensor:
        """(N, 64) to (N, 10)."""
        result: Tensor = self.classes(features.float())
        return result


class Inception(nn.Module):
    """InceptionV3 with the weights of the original FID, 2,048 features, as torchmetrics has it; the weights are
    downloaded once.

    Raises:
        ImportError: without torch-fidelity and torchvision, which have the network.
        RuntimeError: if the weights are not on this machine and cannot be downloaded, or are damaged.
    """

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
            from torchmetrics.image.fid import NoTrainInceptionV3
        except ImportError as error:
            raise ImportError(
                f"InceptionV3 features need torch-fidelity and torchvision ({error}); pip install torch-fidelity, or "
                "give other --features"
            ) from None
        try:
            # The library would unpickle whatever is in its cache. This is read without running code first, and what is
            # downloaded is held against the hash in its name.
            torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True)
        except OSError as error:
            raise RuntimeError(
                f"the weights of InceptionV3 are not on this machine and cannot be downloaded ({error}); give other "
                "--features, or run it once where there is a network"
            ) from None
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise RuntimeError(f"the weights of InceptionV3 from {URL_INCEPTION_V3} are damaged: {error}") from None
        self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"])

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W), any size, grey or colour, to float32 (N, 2048)."""
        features: Tensor = self.network(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)
        return features

    def logits(self, features: Tensor) -> Tensor:
        """(N, 2048) to (N, 1008), without bias, as the Inception score takes them."""
        return F.linear(features.float(), self.network.fc.weight)


class Scripted(nn.Module):
    """A TorchScript file of one's own: uint8 (N, C, H, W) to (N, D).

    Raises:
        ValueError: if the file is none, or its result is no matrix.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        super().__init__()
        try:
            self.network = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
            found = self.network(torch.zeros(2, *shape, dtype=torch.uint8))
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{path} is no TorchScript file that takes uint8 (N, {shape[0]}, ...): {reason}") from None
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2:
            raise ValueError(f"{path} must turn uint8 (N, C, H, W) into (N, D)")
        self.num_features = found.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) to (N, D)."""
        features: Tensor = self.network(images)
        return features


def load_features(name: str, shape: tuple[int, int, int]) -> nn.Module:
    """A feature extractor in evaluation mode.

    Args:
        name: `pixels`, `mnist` (the classifier of digits), `inception`, or a TorchScript file.
        shape: (C, H, W) of the images.

    Raises:
        ValueError: if it does not take such images, or is no such file.
        FileNotFoundError: if it is none of them.
        ImportError, RuntimeError: as `Inception`.
    """
    if name == "pixels":
        return Pixels(shape).eval()
    if name == "inception":
        return Inception().eval()
    if name == "mnist":
        if shape != (1, 28, 28):
            raise ValueError(
                f"the features mnist are of grey images of 28x28, not of {shape}; give pixels or inception"
            )
        from safetensors.torch import load_file

        with torch.device("meta"):
            classifier = DigitClassifier()
        fill_model(classifier, load_file(CLASSIFIER), CLASSIFIER.name, torch.float32)
        return classifier.eval()
    if Path(name).is_file():
        return Scripted(Path(name), shape).eval()
    raise FileNotFoundError(f"there are no features {name!r}; give pixels, mnist, inception or a TorchScript file")


def identity(features: nn.Module) -> str:
    """What tells these features from others: the class and a hash of its weights."""
    network = getattr(features, "network", features)
    return f"{type(features).__name__}-{features.num_features}-{digest(dict(network.state_dict()))[:16]}"
