"""`ddim sample`: paint pictures."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from ddim.cli import options
from ddim.cli.common import choose_timesteps, finish, load_pipeline, number, parse_timesteps


def sample(
    model: options.Model = "mnist",
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            help="x.png is a grid, a folder gets one PNG an image, x.npz holds arr_0 as uint8 NHWC, x.tar stands for "
            "WebDataset shards x-000000.tar, ...",
        ),
    ] = "samples.png",
    count: options.Count = 16,
    steps: Annotated[
        str,
        typer.Option(
            help="Network evaluations a picture: fewer are faster, more are finer; auto for the fewest that keep to "
            "--tolerance."
        ),
    ] = "50",
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Of --steps auto: mean squared error, in [0, 1], to pictures of very many steps; 0.001 unless given."
        ),
    ] = None,
    eta: options.Eta = 0.0,
    seed: options.Seed = 0,
    batch_size: Annotated[int, typer.Option(help="Pictures painted at once.")] = 64,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    order: options.Order = None,
    sigma_hat: Annotated[
        bool, typer.Option("--sigma-hat", help="Noise with DDPM's larger variance; goes with --eta 1.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the pictures that are in --out and start afresh.")
    ] = False,
    shard_size: Annotated[int, typer.Option(help="Pictures a tar shard, in whole batches.")] = 1000,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Paint pictures.

    The path of the result is printed. A folder, x.npz and x.tar get a manifest, and the same command, stopped and
    started again, goes on where it was; torchrun or accelerate launch share the work among processes.

    Examples:

      ddim sample                                         # 16 digits, 50 steps, samples.png

      ddim sample --steps 20 --count 64 --out digits.png

      ddim sample --steps auto --order 2                  # as few steps as keep to the tolerance

      ddim sample --eta 1 --steps 1000 --sigma-hat        # DDPM

      ddim sample -m google/ddpm-cifar10-32 -n 8 --out pictures/

      torchrun --nproc-per-node 8 -m ddim sample -n 50000 --out digits.npz
    """
    from ddim.bulk import sample_many
    from ddim.distributed import local_device, rank_and_world_size
    from ddim.io.image_files import OUTPUT_SUFFIXES, check_output_path, is_folder_path, save_images

    target = check_output_path(out, OUTPUT_SUFFIXES | {".tar": "WebDataset shards"})
    own_timesteps = parse_timesteps(timesteps)
    number_of_steps = None if steps == "auto" else parse_steps(steps)
    if number_of_steps is None and (own_timesteps is not None or spacing is not None or eta):
        raise ValueError(
            "--steps auto is for the model's own timesteps and eta 0; leave out --timesteps, --spacing, --eta"
        )
    if number_of_steps is not None and tolerance is not None:
        raise ValueError("--tolerance goes with --steps auto")
    rank, world = rank_and_world_size()
    pipe = load_pipeline(model, local_device(device), dtype, engine)
    if number_of_steps is None:
        from ddim.tuning import enough_steps

        number_of_steps, error = enough_steps(pipe, 0.001 if tolerance is None else tolerance, order)
        if rank == 0:
            print(f"{number(number_of_steps, 'step')}, mean squared error {error:.1e}", file=sys.stderr)
    settings: dict[str, Any] = {
        "eta": eta,
        "num_inference_steps": number_of_steps,
        "timesteps": choose_timesteps(pipe, number_of_steps, spacing, own_timesteps),
        "order": order,
        "use_sigma_hat": sigma_hat,
    }
    started = time.monotonic()
    if is_folder_path(out) or target.suffix.lower() in (".npz", ".tar"):
        result = sample_many(pipe, out, count, seed, batch_size, shard_size, overwrite, **settings)
        summary = f"{number(result.sampled, 'picture')} in {time.monotonic() - started:.1f} s"
        if result.done < result.count or result.sampled < result.count:
            summary += f"; {result.done} of {result.count} are there"
        if rank == 0:
            finish(target, 0, summary)
        return
    if world > 1:
        raise ValueError("a grid is painted by one process; many go with a folder, x.npz or x.tar")
    images = pipe.paint(count, seed, batch_size, **settings)
    seconds = time.monotonic() - started
    replaced = int(target.exists())
    save_images(images, out)
    finish(target, replaced, f"{number(len(images), 'picture')} in {seconds:.1f} s")


def parse_steps(text: str) -> int:
    """The number in `--steps`."""
    if not text.removeprefix("-").isdecimal():
        raise ValueError(f"--steps {text!r} is neither a whole number nor auto")
    return int(text)
