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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddim.distributed import SINGLE_PROCESS, ProcessGroup
from ddim.evaluation.features import identity
from ddim.evaluation.image_sets import ImageSet
from ddim.io.atomic import atomic_write
from ddim.io.cache import cache_folder

METRICS = ("fid", "kid", "is", "precision", "recall")
NEIGHBOURS = 3
SUBSETS, SUBSET = 100, 1000
"""Of the kernel distance: how many, and the most images in one."""
ROWS = 1024
COMPLETE: dict[str, Any] = {"sync_on_compute": False}
"""For torchmetrics: what it is given are the features of all processes, not of this one."""


@dataclass(frozen=True)
class Features:
    """The features of a set.

    Attributes:
        values: (N, D) float32.
        sha256: of the pixels, batch by batch.
    """

    values: Tensor
    sha256: str


@torch.no_grad()
def compute_features(images: ImageSet, extractor: nn.Module, group: ProcessGroup = SINGLE_PROCESS) -> Features:
    """The features of all images of a set, each process of a group computing its share of the batches.

    The pixels of files are read and hashed first; features that were computed of the same pixels before are taken from
    the cache of the first process.
    """
    cached = None
    hashes = []
    if images.files:
        hashes = group.all_gather([_sha256(images.batch(number)) for number in group.shard(len(images))])
        cached = cache_folder() / "features" / f"{identity(extractor)}-{_whole(images, hashes)}.npy"
        if (kept := group.broadcast(_read(cached) if group.is_main else None)) is not None:
            return Features(kept, _whole(images, hashes))
    values, own = [], []
    bar = tqdm(
        total=images.count,
        desc=f"features of {images.name}",
        unit="image",
        dynamic_ncols=True,
        disable=not group.is_main,
    )
    with bar:
        for number in group.shard(len(images)):
            batch = images.batch(number)
            own.append(_sha256(batch))
            values.append(extractor(batch).float())
            bar.update(min(len(batch) * group.size, images.count - bar.n))
    features = Features(torch.cat(group.all_gather(values)), _whole(images, hashes or group.all_gather(own)))
    if cached is not None and group.is_main:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(cached) as temporary:
            np.save(temporary, features.values.numpy(), allow_pickle=False)
    return features


def _sha256(batch: Tensor) -> str:
    return hashlib.sha256(batch.numpy().tobytes()).hexdigest()


def _whole(images: ImageSet, hashes: list[str]) -> str:
    """The hash of a set whose batches have these."""
    return hashlib.sha256(str((images.count, images.shape, hashes)).encode()).hexdigest()


def _read(cached: Path) -> Tensor | None:
    """Features that are kept; damaged ones are removed."""
    try:
        return torch.from_numpy(np.load(cached, allow_pickle=False))
    except FileNotFoundError:
        return None
    except ValueError:
        cached.unlink()
        return None


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

    metric = FrechetInceptionDistance(feature=_Given(samples.shape[1]), **COMPLETE).set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(samples.double(), real=False)
    return float(metric.compute())


def _kernel_distance(samples: Any, reference: Any) -> tuple[Tensor, Tensor]:
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(SUBSET, len(samples), len(reference))
    metric = KernelInceptionDistance(feature=_Given(samples.shape[1]), subsets=SUBSETS, subset_size=size, **COMPLETE)
    metric.update(reference, real=True)
    metric.update(samples, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result: tuple[Tensor, Tensor] = metric.compute()
    return result


def _inception_score(logits: Tensor) -> tuple[Tensor, Tensor]:
    from torchmetrics.image.inception import InceptionScore

    metric = InceptionScore(feature=_Given(logits.shape[1]), splits=min(10, len(logits)), **COMPLETE)
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
