"""Sampling many images into files."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddim.bulk.manifest import check_manifest, write_manifest
from ddim.bulk.targets import Target, make_target
from ddim.diffusion.guidance import Conditions
from ddim.diffusion.sampling_config import SamplingConfig
from ddim.distributed import job_name, rank_and_world_size
from ddim.engine import get_engine
from ddim.io.class_labels import arguments_of_batch
from ddim.io.fingerprint import model_sha256
from ddim.io.images import to_values
from ddim.io.json_files import to_json
from ddim.io.locks import OutputLock
from ddim.latents import Condition
from ddim.pipeline import DDIMPipeline, ImagePipeline
from ddim.validation import integer, pluralize

logger = logging.getLogger(__name__)

COUNT_INTERVAL_SECONDS = 1.0
"""Time between counts of the images of other processes."""
START_SECONDS = 60.0
"""How long a process that has finished waits for others of its job to start."""
MAX_LISTED = 3
"""Damaged files that a message names."""


@dataclass(frozen=True)
class BulkResult:
    """The outcome of a run of bulk sampling.

    Attributes:
        sampled: images sampled by this process in this run.
        done: images present, of all processes and runs.
        count: images requested.

    Example:
        >>> BulkResult(sampled=2, done=6, count=8).done
        6
    """

    sampled: int
    done: int
    count: int


def sample_many(
    pipe: ImagePipeline,
    out: str | Path,
    count: int,
    seed: int = 0,
    batch_size: int = 64,
    shard_size: int = 1000,
    overwrite: bool = False,
    **settings: Any,
) -> BulkResult:
    """Sample images into a folder, an npz file or tar shards; resume an earlier run with the same settings.

    Under a launcher such as `torchrun` each of n processes samples every n-th batch. They do not wait for each other:
    the one that finishes the last batch of a file assembles it, and the last to end checks that all images are present.

    The output is locked against other runs. Files of earlier runs are verified; damaged ones are sampled again, with a
    warning.

    Args:
        pipe: the pipeline; on CPUs its engine's results do not depend on the number of threads.
        out: a folder, `x.npz` or `x.tar`, as described in `ddim.bulk.targets`.
        count: number of images.
        seed: seed of the first image; image i comes from `seed + i`.
        batch_size: images per batch; at most `count`.
        shard_size: images per tar shard, rounded down to whole batches.
        overwrite: delete existing images and start over; requires a single process.
        settings: `eta`, `num_inference_steps`, `timesteps`, `order` and `use_sigma_hat`, classes and guidance of
            `DDIMPipeline.__call__`; one label for all images, or `count` of them, which an npz file holds as `arr_1`; a
            guide as a pipeline.

    Returns:
        How many images were sampled, and how many are present.

    Raises:
        ValueError: for arguments out of range, or if `out` holds images with other settings.
        FileExistsError: if `out` holds images without a manifest.
        RuntimeError: if another run writes to `out`, or images of other processes are missing in the end.
        OSError: if files cannot be written.

    Example:
        >>> import numpy as np
        >>> from tempfile import TemporaryDirectory
        >>> pipe = DDIMPipeline.from_pretrained("mnist")
        >>> with TemporaryDirectory() as folder:
        ...     sample_many(pipe, f"{folder}/digits.npz", 2, num_inference_steps=1)
        ...     np.load(f"{folder}/digits.npz")["arr_0"].shape
        BulkResult(sampled=2, done=2, count=2)
        (2, 28, 28, 1)
    """
    count, batch_size = integer("count", count, 1), min(integer("batch_size", batch_size, 1), count)
    seed, shard_size = integer("seed", seed, 0), integer("shard_size", shard_size, 1)
    rank, world_size = rank_and_world_size()
    C, H, W = pipe.sample_shape
    pixel_format = pipe.pixel_format
    target = make_target(out, count, batch_size, seed, (H, W, C), shard_size, pixel_format.dtype)
    condition: Any = {name: settings.pop(name) for name in Condition.__annotations__ if name in settings}
    conditions = pipe.conditions(count, **condition)
    identity = _identity(pipe, target, settings) | _describe(conditions, condition.get("guide"))
    if conditions is not None and conditions.labels is not None and condition.get("class_labels") is not None:
        target.labels = conditions.labels.tolist()
    if overwrite and world_size > 1:
        raise ValueError(
            f"overwrite=True must run in a single process, got {world_size}: it deletes files that others write"
        )

    quiet_pipe = pipe.quiet_copy()
    batches = target.batches[rank::world_size]
    with OutputLock(target.lock_path, job_name()) as lock:
        _open(target, identity, overwrite, batches)
        done = target.done_batches()
        sampled = 0
        counted_at = time.monotonic()
        with tqdm(total=count, unit="image", dynamic_ncols=True, disable=rank != 0) as bar:
            bar.initial = bar.n = _count(target, done)
            for batch in batches:
                if batch in done:
                    continue
                indices = target.indices(batch)
                seeds = range(seed + indices.start, seed + indices.start + batch_size)
                of_batch = arguments_of_batch(condition, indices.start, batch_size, count)
                images = quiet_pipe(
                    batch_size, seeds=seeds, output_type="np", return_dict=False, **settings, **of_batch
                )[0]
                target.write_batch(batch, to_values(images, pixel_format)[: len(indices)])
                sampled += len(indices)
                bar.update(len(indices))
                if rank == 0 and world_size > 1 and time.monotonic() - counted_at > COUNT_INTERVAL_SECONDS:
                    bar.n, counted_at = _count(target, target.done_batches()), time.monotonic()
                    bar.refresh()
        target.assemble()
        total = _finish(target, identity, lock)
    return BulkResult(sampled, total, count)


def _identity(pipe: ImagePipeline, target: Target, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that decides the images' bytes, as JSON returns it."""
    plan = pipe.sampler.plan(SamplingConfig(**settings))
    identity: dict[str, Any] = {
        "model_sha256": model_sha256(pipe),
        "scheduler": {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")},
        **plan.config.record(),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe.device.type,
        "engine": get_engine(pipe.unet, pipe.engine).name,
        "count": target.count,
        "seed": target.seed,
        "batch_size": target.batch_size,
        "format": target.path.suffix.lower().removeprefix(".") or target.image_suffix.removeprefix("."),
        "shard_size": target.batches_per_shard * target.batch_size,
    }
    result: dict[str, Any] = json.loads(to_json(identity))
    return result


def _describe(conditions: Conditions | None, guide: DDIMPipeline | None) -> dict[str, Any]:
    """Return what images are conditioned on, as a manifest holds it: labels as pairs (label, number of images)."""
    if conditions is None:
        return {}
    record: dict[str, Any] = {
        "class_labels": _run_lengths(conditions.labels),
        "guidance_scale": conditions.guidance.scale,
        "guidance_interval": None if conditions.guidance.interval is None else list(conditions.guidance.interval),
        "negative_labels": _run_lengths(conditions.baseline_labels),
    }
    return record | ({} if guide is None else {"guide_sha256": model_sha256(guide)})


def _run_lengths(labels: Tensor | None) -> list[list[int]] | None:
    if labels is None:
        return None
    values, counts = torch.unique_consecutive(labels.cpu(), return_counts=True)
    return torch.stack([values, counts], 1).tolist()


def _count(target: Target, batches: set[int]) -> int:
    """Return the number of images in batches."""
    return sum(len(target.indices(batch)) for batch in batches)


def _open(target: Target, identity: dict[str, Any], overwrite: bool, batches: range) -> None:
    """Check that existing images have these settings and are undamaged, or delete them; create folders and manifest."""
    if overwrite:
        target.clear()
    if target.manifest.exists():
        check_manifest(target.manifest, identity)
    elif existing := target.existing_files():
        raise FileExistsError(
            f"{existing[0]} exists, and no {target.manifest.name} describes it; pass overwrite=True to replace it, or "
            "write elsewhere"
        )
    target.create_folders()
    target.remove_leftovers()
    if damaged := target.discard_damaged(batches):
        listed = ", ".join(damaged[:MAX_LISTED]) + (", ..." if len(damaged) > MAX_LISTED else "")
        logger.warning("sampling again what %s held: %s", pluralize(len(damaged), "damaged file"), listed)
    if not target.manifest.exists():
        write_manifest(target.manifest, identity, 0)


def _finish(target: Target, identity: dict[str, Any], lock: OutputLock) -> int:
    """Write the manifest; return the number of images present once it is all, or others of the job are at work."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        # Asked before counting: another process may write its last images and end in between.
        is_shared = lock.is_shared()
        total, done = -1, target.done_batches()
        # Counted again after writing: another process may have written a later count before.
        while total != _count(target, done):
            total = _count(target, done)
            write_manifest(target.manifest, identity, total)
            done = target.done_batches()
        if total == target.count or is_shared:
            return total
        if not lock.job or time.monotonic() > deadline:
            raise RuntimeError(
                f"{total} of {pluralize(target.count, 'image')} are present, and no other process of this job is "
                "running; run again to sample the rest"
            )
        time.sleep(COUNT_INTERVAL_SECONDS)
