"""How far a set of images is from another, by their features: through torchmetrics, but for precision and recall.

    Fréchet distance   || mu_1 - mu_2 ||^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))   FID if InceptionV3's (arXiv 1706.08500)
    kernel distance    unbiased MMD^2 with the kernel (x.y / D + 1)^3            KID (arXiv 1801.01401)
    inception score    exp(E[KL(p(class | image) || p(class))])                  of one set (arXiv 1606.03498)
    precision          the share of samples within the real images' manifold     (arXiv 1904.06991)
    recall             the share of real images within the samples' manifold

A manifold is the union of balls around the images of a set, each as wide as the distance to the third nearest other.

Features are computed once for all of them, and kept in the cache folder for sets of files, by a hash of the pixels.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddim.evaluation.features import identity
from ddim.evaluation.sets import ImageSet
from ddim.files import cache_folder, write_whole

METRICS = ("fid", "kid", "is", "precision", "recall")
NEIGHBOURS = 3
SUBSETS, SUBSET = 100, 1000
"""Of the kernel distance: how many, and the most images in one."""
ROWS = 1024


@dataclass(frozen=True)
class Features:
    """The features of a set.

    Attributes:
        values: (N, D) float32.
        sha256: of the pixels, in order.
    """

    values: Tensor
    sha256: str


@torch.no_grad()
def compute_features(images: ImageSet, extractor: nn.Module) -> Features:
    """The features of all images of a set.

    The pixels are read and hashed first, for sets of files; features that were computed of the same pixels before are
    taken from the cache.
    """
    cached = None
    sha256 = hashlib.sha256(str(images.shape).encode())
    if images.files:
        for batch in images.batches():
            sha256.update(batch.numpy().tobytes())
        cached = cache_folder() / "features" / f"{identity(extractor)}-{sha256.hexdigest()}.npy"
        if cached.exists():
            try:
                return Features(torch.from_numpy(np.load(cached, allow_pickle=False)), sha256.hexdigest())
            except ValueError:
                cached.unlink()
    values = []
    with tqdm(total=images.count, desc=f"features of {images.name}", unit="image", dynamic_ncols=True) as bar:
        for batch in images.batches():
            if cached is None:
                sha256.update(batch.numpy().tobytes())
            values.append(extractor(batch).float())
            bar.update(len(batch))
    features = Features(torch.cat(values), sha256.hexdigest())
    if cached is not None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(cached) as temporary:
            np.save(temporary, features.values.numpy(), allow_pickle=False)
    return features


class _Given(nn.Module):
    """For torchmetrics: features in place of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def measure(
    samples: Tensor, reference: Tensor | None, metrics: Iterable[str], logits: Tensor | None = None
) -> dict[str, Any]:
    """The metrics of samples.

    Args:
        samples: features (N, D).
        reference: features (M, D) of what they are compared with; not needed for the inception score alone.
        metrics: of `METRICS`.
        logits: (N, classes) of the samples, for the inception score.

    Returns:
        A value for each, in the order of `METRICS`; of `kid` and `is` the standard deviation besides, as `kid_std`.

    Raises:
        ValueError: for unknown metrics, sets that are too small, or features that cannot tell classes.
    """
    wanted = list(metrics)
    if unknown := [name for name in wanted if name not in METRICS]:
        raise ValueError(f"there is no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
    if set(wanted) - {"is"} and reference is None:
        raise ValueError("give a reference to compare with")
    if (smallest := min(len(t) for t in (samples, reference) if t is not None)) <= NEIGHBOURS:
        raise ValueError(f"a set has {smallest} images; {NEIGHBOURS + 1} are needed at least")
    values: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric .* will save all extracted features")
        for name in METRICS:
            if name not in wanted:
                continue
            if name == "is":
                if logits is None:
                    raise ValueError("the inception score needs features that tell classes: mnist or inception")
                values |= _with_deviation(name, _inception_score(logits))
            elif name == "fid":
                values[name] = frechet(samples, reference)
            elif name == "kid":
                values |= _with_deviation(name, _kernel_distance(samples, reference))
            elif name == "precision":
                values[name] = within(samples, reference)
            else:
                values[name] = within(reference, samples)
    return values


def frechet(samples: Any, reference: Any) -> float:
    """The Fréchet distance of features."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(samples.shape[1])).set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(samples.double(), real=False)
    return float(metric.compute())


def _kernel_distance(samples: Any, reference: Any) -> tuple[Tensor, Tensor]:
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(SUBSET, len(samples), len(reference))
    metric = KernelInceptionDistance(feature=_Given(samples.shape[1]), subsets=SUBSETS, subset_size=size)
    metric.update(reference, real=True)
    metric.update(samples, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result: tuple[Tensor, Tensor] = metric.compute()
    return result


def _inception_score(logits: Tensor) -> tuple[Tensor, Tensor]:
    from torchmetrics.image.inception import InceptionScore

    metric = InceptionScore(feature=_Given(logits.shape[1]), splits=min(10, len(logits)))
    metric.update(logits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result: tuple[Tensor, Tensor] = metric.compute()
    return result


def _with_deviation(name: str, result: tuple[Tensor, Tensor]) -> dict[str, float]:
    mean, deviation = result
    return {name: float(mean), f"{name}_std": float(deviation)}


def within(points: Any, manifold: Any) -> float:
    """The share of points (N, D) that lie within the manifold of others (M, D)."""
    # Distances by way of products of matrices are exact enough around the origin only.
    centre = manifold.mean(0)
    points, manifold = points - centre, manifold - centre
    radii = torch.cat([torch.cdist(rows, manifold).kthvalue(NEIGHBOURS + 1).values for rows in manifold.split(ROWS)])
    inside = [(torch.cdist(rows, manifold) <= radii).any(dim=1) for rows in points.split(ROWS)]
    return float(torch.cat(inside).double().mean())


def shortage(features: nn.Module, *counts: int) -> str | None:
    """Why so few images do not tell a Fréchet distance, if they do not."""
    dimension, smallest = int(features.num_features), min(counts)  # type: ignore[arg-type]
    if smallest > dimension:
        return None
    return (
        f"{smallest} images are too few for a Fréchet distance of {dimension} features: their covariance has a rank of "
        f"at most {smallest - 1}, and the distance comes out too large"
    )
