"""Painting many pictures into files."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ddim.bulk.manifest import check_manifest, write_manifest
from ddim.bulk.targets import Target, make_target
from ddim.diffusion.sampling_config import SamplingConfig
from ddim.distributed import rank_and_world_size
from ddim.engine import get_engine
from ddim.io.config import to_json
from ddim.io.fingerprint import model_sha256
from ddim.io.images import to_bytes
from ddim.pipeline import DDIMPipeline
from ddim.validation import integer

COUNT_EVERY = 1.0
"""Seconds between looks at what the other processes have done."""


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        painted: pictures painted by this process.
        done: pictures that are there, of all processes.
        count: pictures there shall be.
    """

    painted: int
    done: int
    count: int


def sample_many(
    pipe: DDIMPipeline,
    out: str | Path,
    count: int,
    seed: int = 0,
    batch_size: int = 64,
    shard_size: int = 1000,
    overwrite: bool = False,
    share: tuple[int, int] | None = None,
    **settings: Any,
) -> Result:
    """Paint pictures into a folder, an npz file or tar shards; go on where an earlier run of these settings stopped.

    Args:
        pipe: paints; on CPUs through the engine, whose numbers do not depend on how many threads there are.
        out: a folder, `x.npz` or `x.tar`, as `ddim.bulk.targets` tells.
        count: how many.
        seed: of the first; picture i comes from `seed + i`.
        batch_size: pictures painted at once; no more than `count` are.
        shard_size: pictures a tar shard.
        overwrite: delete what is there and start afresh.
        share: (i, n) for the i-th of n processes, which paints every n-th batch; as the launcher tells unless given.
            Processes do not wait for each other: the one that finishes the last batch of a file puts it together.
        settings: `eta`, `num_inference_steps`, `timesteps`, `order` and `use_sigma_hat` of `DDIMPipeline.__call__`.

    Raises:
        ValueError: for arguments out of range, or if there are pictures of other settings already.
        FileExistsError: if there are pictures that nothing is known of.
        OSError: if files cannot be written.
    """
    count, batch_size = integer("count", count, 1), min(integer("batch_size", batch_size, 1), count)
    seed, shard_size = integer("seed", seed, 0), integer("shard_size", shard_size, 1)
    rank, world = rank_and_world_size() if share is None else share
    target = make_target(out, count, batch_size, seed, shard_size)
    plan = pipe.sampler.plan(SamplingConfig(**settings))
    identity: dict[str, Any] = {
        "model_sha256": model_sha256(pipe),
        "scheduler": {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")},
        **plan.config.record(),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe.device.type,
        "engine": get_engine(pipe.unet, pipe.engine).name,
        "count": count,
        "seed": seed,
        "batch_size": batch_size,
        "format": target.path.suffix.lower().removeprefix(".") or "png",
        "shard_size": getattr(target, "batches_a_shard", 0) * batch_size,
    }
    identity = json.loads(to_json(identity))
    if overwrite and world > 1:
        raise ValueError(
            "--overwrite deletes what is there, which one process has to do alone; run it without the others"
        )
    _open(target, identity, overwrite)

    fast = DDIMPipeline(pipe.unet, pipe.scheduler, pipe.engine)
    fast.set_progress_bar_config(disable=True)
    done = target.done()
    todo = [batch for batch in target.batches[rank::world] if batch not in done]
    painted = 0
    bar = tqdm(total=count, unit="picture", dynamic_ncols=True, disable=rank != 0)
    bar.initial = bar.n = _count(target, done)
    looked = time.monotonic()
    with bar:
        for batch in todo:
            indices = target.pictures(batch)
            seeds = range(seed + indices.start, seed + indices.start + batch_size)
            images = fast(batch_size, seeds=seeds, output_type="np", return_dict=False, **settings)[0]
            target.put(batch, to_bytes(np.asarray(images))[: len(indices)])
            painted += len(indices)
            bar.update(len(indices))
            if rank == 0 and world > 1 and time.monotonic() - looked > COUNT_EVERY:
                bar.n, looked = _count(target, target.done()), time.monotonic()
                bar.refresh()
    target.finish()
    total = _count(target, target.done())
    write_manifest(target.manifest, identity, total)
    return Result(painted, total, count)


def _count(target: Target, batches: set[int]) -> int:
    """Pictures in so many batches."""
    return sum(len(target.pictures(batch)) for batch in batches)


def _open(target: Target, identity: dict[str, Any], overwrite: bool) -> None:
    """See that what is there belongs to these settings, or delete it."""
    if overwrite:
        target.clear()
    if target.manifest.exists():
        check_manifest(target.manifest, identity)
    elif existing := target.existing():
        raise FileExistsError(
            f"{existing[0]} is there, and no {target.manifest.name} that says what it is; give --overwrite to replace "
            "it, or another --out"
        )
    target.prepare()
    if not target.manifest.exists():
        write_manifest(target.manifest, identity, 0)
