"""Distances between sets of images by their features: torchmetrics, except for precision and recall.

    Fréchet distance   || mu_1 - mu_2 ||^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))   FID for InceptionV3 (arXiv 1706.08500)
    kernel distance    unbiased MMD^2 with the kernel (x.y / D + 1)^3            KID (arXiv 1801.01401)
    inception score    exp(E[KL(p(class | image) || p(class))])                  of one set (arXiv 1606.03498)
    precision          the fraction of samples within the real images' manifold  (arXiv 1904.06991)
    recall             the fraction of real images within the samples' manifold

A manifold is the union of balls around the images of a set, each with the distance to the third nearest other image as
its radius.

Features are computed once for all metrics. Those of files are cached by a hash of their pixels.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddim.distributed import SINGLE_PROCESS, ProcessGroup
from ddim.evaluation.features import extractor_id
from ddim.evaluation.image_sets import ImageSet, batch_sha256, set_sha256
from ddim.io.cache import Cache
from ddim.validation import choice

logger = logging.getLogger(__name__)

METRICS = ("fid", "kid", "is", "precision", "recall")
"""The names of the metrics that `measure` knows."""
NUM_NEIGHBORS = 3
"""The neighbor whose distance is the radius of a ball of the manifold."""
MIN_KID_IMAGES = 500
"""Below this a kernel distance is reported with a warning."""
NUM_KID_SUBSETS, MAX_KID_SUBSET_SIZE = 100, 1000
MAX_IS_SPLITS = 10
ROWS_PER_BLOCK = 1024
"""Images whose distances to all others are computed at once."""
NO_SYNC: dict[str, Any] = {"sync_on_compute": False}
"""For torchmetrics, which is given the features of all processes and must not gather them again."""


@dataclass(frozen=True)
class FeatureSet:
    """The features of a set of images.

    Attributes:
        values: (N, D) float32.
        sha256: hash of the pixels, batch by batch.

    Example:
        >>> FeatureSet(torch.zeros(10, 4), "0" * 64).values.shape
        torch.Size([10, 4])
    """

    values: Tensor
    sha256: str


@torch.no_grad()
def compute_features(images: ImageSet, extractor: nn.Module, group: ProcessGroup = SINGLE_PROCESS) -> FeatureSet:
    """Compute the features of a set of images, each process of a group those of its shard of the batches.

    The pixels of files are hashed first, and features of equal pixels are read from the cache of process 0.

    Args:
        images: the set.
        extractor: a feature extractor that accepts its images.
        group: the processes that share the work.

    Returns:
        The features of all images, in every process.

    Example:
        >>> from ddim.evaluation.features import Pixels
        >>> pixels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
        >>> images = ImageSet("zeros", (1, 4, 4), 2, lambda number: pixels, from_files=False)
        >>> compute_features(images, Pixels((1, 4, 4))).values.shape
        torch.Size([2, 16])
    """
    cache, entry = Cache("features"), ""
    hashes = []
    if images.from_files:
        hashes = group.all_gather([batch_sha256(images.read_batch(number)) for number in group.shard(len(images))])
        entry = f"{extractor_id(extractor)}-{set_sha256(images, hashes)}"
        expected = images.count, int(extractor.num_features)  # type: ignore[arg-type]
        cached = cache.read(entry, lambda content: _parse_features(content, expected)) if group.is_main else None
        if (cached := group.broadcast(cached)) is not None:
            return FeatureSet(cached, set_sha256(images, hashes))
    values, shard_hashes = [], []
    bar = tqdm(
        total=images.count,
        desc=f"features of {images.name}",
        unit="image",
        dynamic_ncols=True,
        disable=not group.is_main,
    )
    with bar:
        for number in group.shard(len(images)):
            batch = images.read_batch(number)
            shard_hashes.append(batch_sha256(batch))
            values.append(extractor(batch).float())
            bar.update(min(len(batch) * group.size, images.count - bar.n))
    hashes = hashes or group.all_gather(shard_hashes)
    features = FeatureSet(torch.cat(group.all_gather(values)), set_sha256(images, hashes))
    if entry and group.is_main:
        stream = io.BytesIO()
        np.save(stream, features.values.numpy(), allow_pickle=False)
        cache.write(entry, [stream.getvalue()])
    return features


def measure(
    samples: Tensor, reference: Tensor | None, metrics: Iterable[str], logits: Tensor | None = None
) -> dict[str, Any]:
    """Compute metrics of samples from features.

    Args:
        samples: features (N, D) of the samples.
        reference: features (M, D) of the images to compare with; `None` if the inception score is the only metric.
        metrics: names among `METRICS`.
        logits: (N, classes) of the samples, for the inception score.

    Returns:
        A value per metric, in the order of `METRICS`; `kid` and `is` are followed by their standard deviations,
        `kid_std` and `is_std`.

    Raises:
        ValueError: for an unknown metric, a missing reference or missing logits, or fewer than four images.

    Example:
        >>> points = torch.arange(8.0)[:, None]
        >>> measure(points, points, ["recall", "precision"])
        {'precision': 1.0, 'recall': 1.0}
    """
    requested = check_metrics(metrics, reference is not None)
    sizes = [len(features) for features in (samples, reference) if features is not None]
    if min(sizes) <= NUM_NEIGHBORS:
        raise ValueError(f"a set of images must have at least {NUM_NEIGHBORS + 1} images, got {min(sizes)}")
    values: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric .* will save all extracted features")
        for name in METRICS:
            if name not in requested:
                continue
            if name == "is":
                if logits is None:
                    raise ValueError("the inception score requires features with logits: mnist or inception")
                values |= _with_deviation(name, _inception_score(logits))
            elif name == "fid":
                values[name] = frechet(samples, reference)
            elif name == "kid":
                if min(sizes) < MIN_KID_IMAGES:
                    logger.warning(
                        "the kernel distance of %d images varies more from set to set than models differ; use at least "
                        "%d", min(sizes), MIN_KID_IMAGES,
                    )  # fmt: skip
                values |= _with_deviation(name, _kernel_distance(samples, reference))
            elif name == "precision":
                values[name] = manifold_coverage(samples, reference)
            else:
                values[name] = manifold_coverage(reference, samples)
    return values


def check_metrics(metrics: Iterable[str], has_reference: bool) -> list[str]:
    """Check names of metrics, and that there is a reference if one requires it.

    Args:
        metrics: names.
        has_reference: whether there is a set to compare with.

    Returns:
        The names.

    Raises:
        ValueError: for an unknown metric or a missing reference.

    Example:
        >>> check_metrics(["is"], has_reference=False)
        ['is']
    """
    names = [choice("metrics", name, METRICS) for name in metrics]
    if set(names) - {"is"} and not has_reference:
        raise ValueError("reference must be given for every metric but the inception score, got None")
    return names


def frechet(samples: Any, reference: Any) -> float:
    """Compute the Fréchet distance between normal distributions fitted to features.

    Args:
        samples: features (N, D).
        reference: features (M, D).

    Returns:
        The squared distance, as usual.

    References:
        Heusel et al., equation (6), arXiv 1706.08500.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Precomputed(samples.shape[1]), **NO_SYNC).set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(samples.double(), real=False)
    return float(metric.compute())


def manifold_coverage(points: Any, manifold: Any) -> float:
    """Compute the fraction of points that lie within the manifold of others.

    Args:
        points: features (N, D).
        manifold: features (M, D) that span the manifold.

    Returns:
        A fraction in [0, 1].

    References:
        Kynkäänniemi et al., equations (1) and (2), arXiv 1904.06991.

    Example:
        >>> manifold_coverage(torch.tensor([[1.5], [9.0]]), torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
        0.5
    """
    # cdist computes large distances from matrix products, which are accurate near the origin only.
    center = manifold.mean(0)
    points, manifold = points - center, manifold - center
    # The nearest image of each is itself.
    radii = torch.cat(
        [torch.cdist(rows, manifold).kthvalue(NUM_NEIGHBORS + 1).values for rows in manifold.split(ROWS_PER_BLOCK)]
    )
    inside = [(torch.cdist(rows, manifold) <= radii).any(dim=1) for rows in points.split(ROWS_PER_BLOCK)]
    return float(torch.cat(inside).double().mean())


def sample_size_warning(extractor: nn.Module, *counts: int) -> str | None:
    """Return a warning if a set has too few images for a Fréchet distance.

    Args:
        extractor: the feature extractor.
        counts: numbers of images.

    Returns:
        The warning, or `None` if every set has more images than there are features.

    Example:
        >>> from ddim.evaluation.features import Pixels
        >>> sample_size_warning(Pixels((1, 2, 2)), 100, 5) is None
        True
    """
    dimension, smallest = int(extractor.num_features), min(counts)  # type: ignore[arg-type]
    if smallest > dimension:
        return None
    return (
        f"{smallest} images are too few for a Fréchet distance of {dimension} features: the rank of their covariance "
        f"is at most {smallest - 1}, and the distance is overestimated"
    )


class _Precomputed(nn.Module):
    """A feature extractor for torchmetrics that passes features through."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _kernel_distance(samples: Any, reference: Any) -> tuple[Tensor, Tensor]:
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(MAX_KID_SUBSET_SIZE, len(samples), len(reference))
    metric = KernelInceptionDistance(
        feature=_Precomputed(samples.shape[1]), subsets=NUM_KID_SUBSETS, subset_size=size, **NO_SYNC
    )
    metric.update(reference, real=True)
    metric.update(samples, real=False)
    # Subsets are drawn from PyTorch's generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result: tuple[Tensor, Tensor] = metric.compute()
    return result


def _inception_score(logits: Tensor) -> tuple[Tensor, Tensor]:
    from torchmetrics.image.inception import InceptionScore

    metric = InceptionScore(feature=_Precomputed(logits.shape[1]), splits=min(MAX_IS_SPLITS, len(logits)), **NO_SYNC)
    metric.update(logits)
    # Images are shuffled by PyTorch's generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result: tuple[Tensor, Tensor] = metric.compute()
    return result


def _with_deviation(name: str, result: tuple[Tensor, Tensor]) -> dict[str, float]:
    mean, deviation = result
    return {name: float(mean), f"{name}_std": float(deviation)}


def _parse_features(content: np.ndarray, expected: tuple[int, int]) -> Tensor:
    """Read cached features of an expected shape."""
    values = np.load(io.BytesIO(content.tobytes()), allow_pickle=False)
    if values.shape != expected or values.dtype != np.float32:
        raise ValueError(f"expected float32 {expected}, got {values.dtype} {values.shape}")
    return torch.from_numpy(values)
