"""`ddim direction`: the direction of an attribute in latent space, which `ddim decode` adds to latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ddim.cli import options
from ddim.cli.common import DEFAULT_MODEL, SamplingOptions, load_pipeline, report_result, split_model
from ddim.cli.conditions import NO_CONDITIONS, ConditionOptions, takes_conditions
from ddim.validation import pluralize, shown

if TYPE_CHECKING:
    from ddim.data.base import Decoded, Source


@takes_conditions
def direction(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Images with the attribute, then images without it: folders, .npz or parquet files. With --where, one "
            "data set that has both.",
            show_default=False,
        ),
    ],
    where: Annotated[
        str | None,
        typer.Option(
            help="Column and value of a data set, such as label=3: images with it have the attribute, all others do "
            "not."
        ),
    ] = None,
    out: Annotated[
        str, typer.Option("--out", "-o", help="File of the direction to write: x.npz or x.safetensors.")
    ] = "direction.safetensors",
    count: Annotated[int, typer.Option("--count", "-n", help="Images of either kind, at most.")] = 128,
    model: options.ModelOption = None,
    weights: options.Weights = None,
    steps: options.Steps = 50,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    resize: options.Resize = False,
    batch_size: options.LatentBatchSize = 8,
    conditions: ConditionOptions = NO_CONDITIONS,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Find the direction of an attribute in latent space, for ddim decode --direction: experimental.

    It is the mean latent of images with the attribute minus that of images without it. The path is printed.

    Of a model with classes, images are encoded by the null class, or by their --label: one for all, or several that
    share them equally, those with the attribute first.

    Examples:
      ddim direction smiling/ others/ --model my-model --out smile.safetensors

      ddim direction mnist/train.parquet --where label=3 --steps 20 --out three.safetensors
    """
    from ddim.data.sources import open_source
    from ddim.inversion import InversionConfig
    from ddim.io.fingerprint import model_sha256
    from ddim.io.image_files import check_output_path
    from ddim.io.latent_files import LATENT_SUFFIXES, LatentSettings, save_latents

    target = check_output_path(out, LATENT_SUFFIXES, folder_allowed=False)
    sampling = SamplingOptions.parse(steps, spacing, timesteps)
    name, paths = split_model(sources, model, weights)
    if len(paths) != (2 if where is None else 1):
        expected = "two sources of images, with the attribute and without it" if where is None else "one data set"
        raise ValueError(f"SOURCES must be {expected}, got {len(paths)}")
    if where is None:
        positive, negative = (_read(source, range(source.count)[:count]) for source in map(open_source, paths))
    else:
        data = open_source(paths[0])
        positive, negative = (_read(data, indices[:count]) for indices in _split(data, where))
    name = name or DEFAULT_MODEL
    pipe = load_pipeline(name, device, dtype, engine)
    chosen = sampling.choose_timesteps(pipe)
    condition = conditions.condition(pipe, len(positive) + len(negative))
    result = pipe.direction(
        positive, negative, steps, timesteps=chosen, resize=resize, batch_size=batch_size, **condition
    )
    visited = pipe.latent_timesteps(steps, chosen)
    settings = LatentSettings(name, model_sha256(pipe), visited, True, InversionConfig.tolerance, [], "direction")
    num_replaced = int(target.exists())
    save_latents(target, result[None], settings)
    report_result(target, num_replaced, f"{pluralize(len(positive), 'image')} against {len(negative)}")


def _read(source: Source, indices: Sequence[int]) -> list[Decoded]:
    return [decode() for decode in source.fetch(indices)]


def _split(data: Source, where: str) -> tuple[list[int], list[int]]:
    """Return the indices of the images that have a value in a column, and of all others."""
    from ddim.data.base import canonical_value

    column, separator, value = where.partition("=")
    if not separator:
        raise ValueError(f"--where must be a column and a value, such as label=3, got {shown(where)}")
    values = data.read_column(column)
    if values is None:
        raise ValueError(f"{data.name} has no column {shown(column)}")
    # A value as it is spelled comes first: text may hold both 3 and 3.0.
    matches = {value} if value in values else {v for v in values if canonical_value(v) == canonical_value(value)}
    positive = [index for index, other in enumerate(values) if other in matches]
    negative = [index for index, other in enumerate(values) if other not in matches]
    if not positive or not negative:
        raise ValueError(
            f"--where must name a value that some images have and others do not, got {shown(value)}; the column "
            f"{column} has {shown(sorted(set(values)))}"
        )
    return positive, negative
