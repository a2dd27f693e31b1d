"""Features: networks, or simpler functions, from images to vectors whose distributions are compared.

A feature extractor is a module that maps uint8 (N, C, H, W) to float (N, D) and has an attribute `num_features`, D. One
that classifies also has a method `logits`, which maps (N, D) features to (N, classes), for the inception score. One
that recognizes attributes is an `AttributeClassifier` (`ddim.evaluation.classifiers`).
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.evaluation.classifiers import CLASSIFIERS, load_classifier
from ddim.extras import require
from ddim.io.weights import digest
from ddim.validation import nearest, shorten

MAX_PIXELS_SIDE = 32
"""Height and width above which `Pixels` averages: the covariance of N features has N^2 entries."""


class Pixels(nn.Module):
    """The pixels themselves, in [0, 1], as features; images larger than 32x32 are averaged down to it.

    They require neither a network nor a download. Distances compare means and covariances of pixels, not what images
    show.

    Args:
        shape: (C, H, W) of the images.

    Example:
        >>> Pixels((1, 2, 2))(torch.full((3, 1, 2, 2), 255, dtype=torch.uint8)).shape
        torch.Size([3, 4])
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        self.size = min(height, MAX_PIXELS_SIDE), min(width, MAX_PIXELS_SIDE)
        self.num_features = channels * self.size[0] * self.size[1]

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (N, C, H, W) to float64 (N, D), D at most 1024 C."""
        pixels = images.double() / 255
        return (pixels if tuple(images.shape[2:]) == self.size else F.adaptive_avg_pool2d(pixels, self.size)).flatten(1)


class Inception(nn.Module):
    """InceptionV3 with the weights of the original FID, 2,048 features, by way of torchmetrics.

    The weights are downloaded once.

    Raises:
        ImportError: without torch-fidelity and torchvision, which provide the network.
        RuntimeError: if the weights are not on this machine and cannot be downloaded, or are damaged.

    References:
        Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
        arXiv 1706.08500.
    """

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        require("features='inception'", "torch_fidelity", "torchmetrics")
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            # torchmetrics would unpickle whatever is in its cache. Therefore the file is first read without running
            # code, and a download is checked against the hash in its name.
            torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True)
        except OSError as error:
            raise RuntimeError(
                f"the weights of InceptionV3 are not on this machine and cannot be downloaded ({error}); choose other "
                "features, or run it once with a network connection"
            ) from None
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise RuntimeError(f"the weights of InceptionV3 from {URL_INCEPTION_V3} are damaged: {error}") from None
        self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"])

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (N, C, H, W), any size, grayscale or color, to float32 (N, 2048)."""
        features: Tensor = self.network(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)
        return features

    def logits(self, features: Tensor) -> Tensor:
        """Map features (N, 2048) to logits (N, 1008), without bias, as the Inception score is defined."""
        return F.linear(features.float(), self.network.fc.weight)


class Scripted(nn.Module):
    """A user-supplied TorchScript file that maps uint8 (N, C, H, W) to (N, D).

    Args:
        path: the file.
        shape: (C, H, W) of the images.

    Raises:
        ValueError: if the file is not TorchScript, or its result is not a matrix.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     torch.jit.script(nn.Flatten()).save(f"{folder}/flatten.pt")
        ...     Scripted(Path(folder) / "flatten.pt", (1, 2, 2)).num_features
        4
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        super().__init__()
        try:
            self.network = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError):
            raise ValueError(f"{path} is not a TorchScript file") from None
        try:
            result = self.network(torch.zeros(2, *shape, dtype=torch.uint8))
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{path} must take uint8 (N, {', '.join(map(str, shape))}): {reason}") from None
        if not isinstance(result, Tensor) or result.ndim != 2 or len(result) != 2:
            raise ValueError(f"{path} must map uint8 (N, C, H, W) to (N, D)")
        self.num_features = result.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 (N, C, H, W) to (N, D)."""
        features: Tensor = self.network(images)
        return features


def load_features(name: str, shape: tuple[int, int, int]) -> nn.Module:
    """Load a feature extractor in evaluation mode.

    Args:
        name: `pixels`, `mnist` or `faces` (the classifiers of digits and of drawn faces), `inception`, or a TorchScript
            file.
        shape: (C, H, W) of the images.

    Returns:
        The extractor.

    Raises:
        ValueError: if it does not accept such images, or the file is not TorchScript.
        FileNotFoundError: for another name.
        ImportError: if the libraries of `inception` are missing.
        RuntimeError: if the weights of `inception` cannot be downloaded, or are damaged.

    Example:
        >>> load_features("pixels", (3, 8, 8)).num_features
        192
    """
    if name == "pixels":
        return Pixels(shape).eval()
    if name == "inception":
        return Inception().eval()
    if name in CLASSIFIERS:
        return load_classifier(name, shape)
    if Path(name).is_file():
        return Scripted(Path(name), shape).eval()
    raise FileNotFoundError(
        f"features must be pixels, mnist, faces, inception or a TorchScript file, got {shorten(repr(name))}"
        f"{nearest(name, ('pixels', *CLASSIFIERS, 'inception'))}"
    )


def extractor_id(extractor: nn.Module) -> str:
    """Return an identifier of a feature extractor: its class, its number of features and a hash of its weights.

    Args:
        extractor: the extractor.

    Returns:
        The identifier, which names cached features.

    Example:
        >>> extractor_id(Pixels((1, 2, 2)))[:9]
        'Pixels-4-'
    """
    network = getattr(extractor, "network", extractor)
    return f"{type(extractor).__name__}-{extractor.num_features}-{digest(dict(network.state_dict()))[:16]}"
