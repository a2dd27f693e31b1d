"""Memorization: whether samples are nearer to the training images than images are that the model has never seen.

    d(x) = min_t || x - t || / sqrt(D)      the root mean square difference of x and the nearest training image t

over the D pixels, in [0, 1], or over the D features of an extractor. d is computed for each sample y, and for held-out
images z: those of a set of their own, or training images drawn at random, each of which is compared with all others.
A model that copies its training images makes the d(y) smaller than the d(z). The Mann-Whitney test compares them by
their order alone:

    U = #{(y, z): d(y) > d(z)} + #{(y, z): d(y) = d(z)} / 2
    Z = (U - m n / 2) / sqrt(m n (m + n + 1) / 12)          for m samples and n held-out images

Z is about standard normal if both come from one distribution; samples are too near far below 0, and farther away than
real images far above. That is the test of Meehan et al., arXiv 2004.05675, for one cell instead of several. Images with
little in them, such as a digit 1, are near to others without being copies: frequencies differ from those of the data
where a model prefers them, which `ddim.evaluation.attributes` shows.

|| x - t ||^2 = || x ||^2 + || t ||^2 - 2 x.t takes matrix products in float64. Sums of products of uint8 pixels are
integers below 2^53, and therefore exact: nothing cancels, and a copy has distance 0.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ddim.distributed import SINGLE_PROCESS, ProcessGroup
from ddim.evaluation.features import extractor_id, load_features
from ddim.evaluation.image_sets import BATCH_SIZE, ImageSet, batch_sha256, set_sha256
from ddim.evaluation.report import describe_method, describe_set
from ddim.extras import require
from ddim.io.atomic import atomic_write
from ddim.io.image_files import stack_rows
from ddim.io.images import as_pil

logger = logging.getLogger(__name__)

BLOCK_BYTES = 64 << 20
"""Memory of each of the float64 matrices of a block: of vectors, of training images, and of their distances."""
MIN_DISTANCES = 100
"""Fewer have no 1st percentile of their own: one that 1% of them are below."""
PERCENTILES = (1, 5, 50)
NUM_PAIRS = 16
HISTOGRAM_BINS = 50

ToVectors = Callable[[Tensor], Tensor]
"""Maps uint8 (n, C, H, W) to the vectors that are compared, (n, D)."""


@dataclass(frozen=True)
class Neighbors:
    """The nearest training image of each of N images.

    Attributes:
        distances: root mean square differences, float64 (N,).
        indices: which training images, int64 (N,).

    Example:
        >>> len(Neighbors(torch.zeros(3), torch.zeros(3, dtype=torch.int64)).indices)
        3
    """

    distances: Tensor
    indices: Tensor


@dataclass(frozen=True)
class Memorization:
    """The distances of samples and of held-out images to their nearest training images.

    Attributes:
        samples: of the samples.
        held_out: of the held-out images.
        pixels: the samples themselves, uint8 (N, C, H, W).

    Example:
        >>> near, far = Neighbors(torch.tensor([0.0, 0.2]), torch.tensor([0, 0])), torch.tensor([0.3, 0.4])
        >>> result = Memorization(near, Neighbors(far, torch.tensor([1, 1])), torch.zeros(2, 1, 4, 4))
        >>> result.metrics()["copies"], result.metrics()["nearer_than_held_out"]
        (1, 2)
    """

    samples: Neighbors
    held_out: Neighbors
    pixels: Tensor

    def metrics(self) -> dict[str, float]:
        """Return the statistics of a report: minima and percentiles, numbers of samples nearer than those, and Z."""
        result: dict[str, float] = {}
        for name, neighbors in (("samples", self.samples), ("held_out", self.held_out)):
            result[f"{name}_min"] = float(neighbors.distances.min())
            for percent in PERCENTILES:
                result[f"{name}_p{percent}"] = float(neighbors.distances.quantile(percent / 100))
        distances = self.samples.distances
        return result | {
            "copies": int((distances == 0).sum()),
            "nearer_than_held_out": int((distances < result["held_out_min"]).sum()),
            "nearer_than_held_out_p1": int((distances < result["held_out_p1"]).sum()),
            "mann_whitney_z": mann_whitney_z(distances, self.held_out.distances),
        }


@torch.no_grad()
def measure_memorization(
    samples: ImageSet,
    training: ImageSet | None,
    held_out: ImageSet | None = None,
    features: str = "pixels",
    group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[Memorization, dict[str, Any]]:
    """Compare samples, and held-out images, with the training images of a model.

    The samples and the held-out images are kept in memory as uint8; training images are read in blocks.

    Args:
        samples: the images to evaluate.
        training: the images that the model was trained on, the reference of the report; `None` is refused.
        held_out: images that it was not trained on, of the same shape; `None` for as many training images as
            samples, drawn at random, each compared with all others.
        features: `pixels`, all of them at full size, or another extractor of `ddim.evaluation.features.load_features`.
        group: the processes that share the work.

    Returns:
        The distances; and a report, as `ddim.evaluation.report.evaluate` returns it.

    Raises:
        ValueError: if no training images are given, or only one to be compared with itself, if images are of different
            shapes, or if the features do not accept them.

    Example:
        >>> pixels = torch.arange(32, dtype=torch.uint8).view(8, 1, 2, 2)
        >>> images = ImageSet("ramp", (1, 2, 2), 8, lambda number: pixels, from_files=False)
        >>> measure_memorization(images, images)[1]["metrics"]["copies"]
        8
    """
    if training is None:
        raise ValueError("reference must be given: the images that the model was trained on, got None")
    for role, images in (("reference", training), ("held_out", held_out)):
        if images is not None and images.shape != samples.shape:
            raise ValueError(f"{role} must hold images of the samples' shape {samples.shape}, got {images.shape}")
    if held_out is None and training.count < 2:
        raise ValueError("reference must hold at least 2 images, to compare them with each other, got 1")
    to_vectors, scale, identity = _space(features, samples.shape)
    pixels = _read_all(samples, group)
    if held_out is None:
        drawn = torch.randperm(training.count, generator=torch.Generator().manual_seed(0))[: samples.count]
        others = read_images(training, drawn)
    else:
        drawn, others = torch.full((held_out.count,), -1), _read_all(held_out, group)
    excluded = torch.cat([torch.full((len(pixels),), -1), drawn])
    vectors = torch.cat([to_vectors(batch) for batch in torch.split(torch.cat([pixels, others]), BATCH_SIZE)])
    neighbors, sha256 = nearest_images(vectors, training, to_vectors, excluded, group)
    parts = slice(len(pixels)), slice(len(pixels), None)
    of_samples, of_others = (Neighbors(neighbors.distances[part] / scale, neighbors.indices[part]) for part in parts)
    result = Memorization(of_samples, of_others, pixels)
    settings = describe_set("samples", samples, _sha256(samples, pixels))
    settings |= describe_set("reference", training, sha256)
    if group.is_main and (fewest := min(len(pixels), len(others))) < MIN_DISTANCES:
        logger.warning("the 1st percentile of %d distances is little more than their minimum", fewest)
    if held_out is None:
        settings |= {"held_out": "drawn from the reference, each compared with all others"}
        settings |= {"held_out_count": len(others), "held_out_sha256": None}
    else:
        settings |= describe_set("held_out", held_out, _sha256(held_out, others))
        if group.is_main and (shared := int((of_others.distances == 0).sum())):
            logger.warning(
                "%d of the %d held-out images have distance 0: they are in the reference", shared, len(others)
            )
    settings |= describe_method(samples.shape, identity)
    return result, {"metrics": result.metrics(), "settings": settings}


def nearest_images(
    vectors: Tensor,
    training: ImageSet,
    to_vectors: ToVectors,
    excluded: Tensor | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> tuple[Neighbors, str]:
    """Find the nearest training image of each vector; the first one among equals.

    Args:
        vectors: uint8 or floating (N, D).
        training: the training images.
        to_vectors: makes vectors of their pixels.
        excluded: per vector the index of a training image that is left out, int64 (N,), -1 for none.
        group: the processes that share the training images.

    Returns:
        The neighbors, in every process; and the hash of the training images.

    Example:
        >>> pixels = torch.tensor([0, 9, 5], dtype=torch.uint8).view(3, 1, 1, 1)
        >>> images = ImageSet("three", (1, 1, 1), 3, lambda number: pixels, from_files=False)
        >>> neighbors, _ = nearest_images(torch.tensor([[4.0], [9.0]]), images, lambda batch: batch.flatten(1))
        >>> neighbors.distances.tolist(), neighbors.indices.tolist()
        ([1.0, 0.0], [2, 1])
    """
    count, dimension = vectors.shape
    excluded = torch.full((count,), -1) if excluded is None else excluded
    best = torch.full((count,), math.inf, dtype=torch.float64)
    indices = torch.full((count,), -1)
    shard, hashes = group.shard(len(training)), []
    batches_per_block = max(1, BLOCK_BYTES // (8 * dimension * BATCH_SIZE))
    rows_per_block = max(1, BLOCK_BYTES // (8 * max(dimension, BATCH_SIZE * batches_per_block)))
    bar = tqdm(total=training.count, desc="nearest images", unit="image", dynamic_ncols=True, disable=not group.is_main)
    with bar:
        for first in range(0, len(shard), batches_per_block):
            numbers = shard[first : first + batches_per_block]
            batches = [training.read_batch(number) for number in numbers]
            hashes += [batch_sha256(batch) for batch in batches]
            block = torch.cat([to_vectors(batch) for batch in batches]).double()
            positions = torch.cat(
                [BATCH_SIZE * number + torch.arange(len(batch)) for number, batch in zip(numbers, batches, strict=True)]
            )
            for rows in torch.split(torch.arange(count), rows_per_block):
                squares = _squared_distances(vectors[rows].double(), block)
                squares[excluded[rows, None] == positions] = math.inf
                nearest, columns = squares.min(1)
                is_nearer = nearest < best[rows]
                best[rows] = torch.where(is_nearer, nearest, best[rows])
                indices[rows] = torch.where(is_nearer, positions[columns], indices[rows])
            bar.update(min(len(positions) * group.size, training.count - bar.n))
    gathered = group.all_gather([(best, indices)])
    all_squares, all_indices = (torch.stack(part) for part in zip(*gathered, strict=True))
    # The smallest index among equally near images, whatever process found it.
    candidates = torch.where(all_squares == all_squares.amin(0), all_indices, training.count)
    distances = (all_squares.amin(0) / dimension).sqrt()
    return Neighbors(distances, candidates.amin(0)), set_sha256(training, group.all_gather(hashes))


def mann_whitney_z(samples: Tensor, held_out: Tensor) -> float:
    """Compute the standardized Mann-Whitney statistic of two sets of distances.

    Args:
        samples: (m,).
        held_out: (n,).

    Returns:
        Z; negative where the samples' distances are smaller.

    References:
        Meehan et al., section 3, arXiv 2004.05675.

    Example:
        >>> round(mann_whitney_z(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])), 3)
        -1.549
    """
    m, n = len(samples), len(held_out)
    values = held_out.sort().values
    smaller = torch.searchsorted(values, samples.contiguous())
    smaller_or_equal = torch.searchsorted(values, samples.contiguous(), right=True)
    u = float((smaller + smaller_or_equal).sum()) / 2
    return (u - m * n / 2) / math.sqrt(m * n * (m + n + 1) / 12)


def read_images(images: ImageSet, indices: Tensor) -> Tensor:
    """Read some images of a set.

    Args:
        images: the set.
        indices: int64 (n,).

    Returns:
        uint8 (n, C, H, W).

    Example:
        >>> pixels = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1)
        >>> images = ImageSet("four", (1, 1, 1), 4, lambda number: pixels, from_files=False)
        >>> read_images(images, torch.tensor([3, 1])).flatten().tolist()
        [3, 1]
    """
    result = torch.empty(len(indices), *images.shape, dtype=torch.uint8)
    numbers, positions = indices // BATCH_SIZE, indices % BATCH_SIZE
    for number in sorted(set(numbers.tolist())):
        chosen = numbers == number
        result[chosen] = images.read_batch(number)[positions[chosen]]
    return result


def draw_pairs(result: Memorization, training: ImageSet, count: int = NUM_PAIRS) -> Image.Image:
    """Draw the samples nearest to training images, the nearest first, each above its training image.

    Args:
        result: the distances.
        training: the training images.
        count: the number of samples, at most.

    Returns:
        Rows of samples and rows of training images.
    """
    order = result.samples.distances.argsort(stable=True)[:count]
    rows = (result.pixels[order], read_images(training, result.samples.indices[order]))
    return stack_rows([[as_pil(image.permute(1, 2, 0).numpy()) for image in row] for row in rows])


def plot_distances(result: Memorization, path: Path) -> None:
    """Plot histograms of the distances of samples and of held-out images.

    Args:
        result: the distances.
        path: a PNG or SVG file.

    Raises:
        ImportError: if matplotlib is not installed.
        OSError: if the file cannot be written.
    """
    require("a plot", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sets = {"samples": result.samples.distances.numpy(), "held-out images": result.held_out.distances.numpy()}
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    largest = max(float(distances.max()) for distances in sets.values()) or 1.0
    for name, distances in sets.items():
        axes.hist(distances, bins=HISTOGRAM_BINS, range=(0, largest), density=True, alpha=0.5, label=name)
    axes.set(xlabel="root mean square difference to the nearest training image", ylabel="density")
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


def _space(features: str, shape: tuple[int, int, int]) -> tuple[ToVectors, float, str]:
    """Return what makes vectors of images, the scale of their distances, and its name in reports."""
    if features == "pixels":
        return lambda batch: batch.flatten(1), 255, "pixels"
    extractor = load_features(features, shape)
    return extractor, 1, extractor_id(extractor)


def _read_all(images: ImageSet, group: ProcessGroup) -> Tensor:
    """Return all images of a set, each process of a group reading its shard of the batches."""
    shard: Sequence[int] = group.shard(len(images))
    bar = tqdm(shard, desc=f"images of {images.name}", unit="batch", dynamic_ncols=True, disable=not group.is_main)
    return torch.cat(group.all_gather([images.read_batch(number) for number in bar]))


def _sha256(images: ImageSet, pixels: Tensor) -> str:
    return set_sha256(images, [batch_sha256(batch) for batch in torch.split(pixels, BATCH_SIZE)])


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared distances (n, m) of float64 vectors (n, D) and (m, D); exact for integers."""
    squares = (a @ b.T).mul_(-2)
    return squares.add_(a.square().sum(1)[:, None]).add_(b.square().sum(1)).clamp_(min=0)
