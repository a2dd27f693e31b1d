"""`ddim ema`: averages of other lengths of a training run, after it."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddim.cli import options
from ddim.cli.common import SamplingOptions, count_model_files, report_result
from ddim.cli.evaluate import DEFAULT_FEATURES, Source
from ddim.validation import shown

if TYPE_CHECKING:
    from ddim.evaluation.curves import Curve
    from ddim.evaluation.image_sets import ImageSet
    from ddim.training.averages import RunAverages

LENGTHS_IN_RANGE = 9
POOR_RESIDUAL = 0.1
"""Part of a profile that may be missing without a warning."""
RANGE = re.compile(r"([^,]+?)\.\.([^,]+)")


def ema(
    run: Annotated[str, typer.Argument(help="The folder of a training run, or of a checkpoint.", show_default=False)],
    sigma_rel: Annotated[
        str,
        typer.Option(
            help="Length of the average: its standard deviation relative to the number of steps, such as 0.08; with "
            "--metric several, 0.05,0.08,0.12, or a range, 0.05..0.25, of which 9 are tried.",
            show_default=False,
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write the model to.", show_default=False)],
    step: Annotated[
        int | None,
        typer.Option(help="Step of the checkpoint where the average ends; defaults to the newest.", show_default=False),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Metric by which the best of several lengths is chosen: fid, kid, is, precision or recall.",
            show_default=False,
        ),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Images to compare with, or a model; required by all metrics but is.")
    ] = None,
    reference_count: Annotated[
        int | None, typer.Option(help="Number of images of the reference; defaults to all.")
    ] = None,
    features: Annotated[
        str, typer.Option(help="Features to compare by, as for ddim evaluate: pixels, mnist, faces, inception.")
    ] = DEFAULT_FEATURES,
    count: options.Count = 1000,
    curve: Annotated[
        list[str] | None,
        typer.Option(help="Write the metric of all lengths to a .json, .csv, .md, .png or .svg file; can be repeated."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of data sets on the hub.")] = "train",
    steps: options.Steps = 50,
    eta: options.Eta = 0.0,
    spacing: options.Spacing = None,
    order: options.Order = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    engine: options.Engine = "auto",
    overwrite: options.OverwriteModel = False,
) -> None:
    """Average the weights of a training run over another length, after the training.

    A run keeps snapshots of two averages (ema.sigma_rels); others are combined from them. The model is written to a
    folder, which is printed. With --metric, a model of each length generates --count images, and the best is written.

    Examples:
      ddim ema runs/mine --sigma-rel 0.08 --out mine-008

      ddim ema runs/mine --sigma-rel 0.05..0.25 --metric fid --reference images/ -n 500 --curve ema.png --out best
    """
    from ddim.evaluation import curves
    from ddim.evaluation.metrics import check_metrics
    from ddim.io.runs import check_model_folder
    from ddim.training.averages import RunAverages
    from ddim.training.power_average import exponent

    folder = Path(out)
    check_model_folder(folder, overwrite)
    lengths = parse_lengths(sigma_rel)
    for length in lengths:
        exponent(length)
    if len(lengths) > 1 and metric is None:
        raise ValueError("several lengths require --metric, and --reference, by which the best is chosen")
    outputs = curves.check_outputs(curve or [], "curve")
    best = lengths[0]
    if metric is None:
        averages = RunAverages(run, step)
    else:
        check_metrics([metric], reference is not None)
        sampling = SamplingOptions.parse(steps, spacing, eta=eta, order=order)
        source = Source(device, engine, split, seed)
        averages = RunAverages(run, step)
        sample_set = source.open(str(averages.checkpoint), sampling, count, None)
        reference_set = None if reference is None else source.open(reference, sampling, reference_count, sample_set)
        measured = _search(averages, lengths, metric, source, sampling, count, reference_set, features)
        for path in outputs:
            curves.write_curve(measured, Path(path))
        print(measured.table(), file=sys.stderr)
        best = measured.best(metric).x
    result = averages.reconstruct(best)
    num_replaced = count_model_files(folder)
    result.pipe.save_pretrained(folder)
    for path in outputs:
        print(f"also in {path}", file=sys.stderr)
    if result.residual > POOR_RESIDUAL:
        tracked = " and ".join(f"{length:g}" for length in averages.sigma_rels)
        print(
            f"the snapshots of sigma_rel {tracked} do not determine this length well; train with ema.sigma_rels nearer "
            "to it, or more ema.snapshots",
            file=sys.stderr,
        )
    summary = f"sigma_rel {best:g} over {result.step:,} steps, from {result.snapshots} snapshots"
    report_result(folder, num_replaced, f"{summary}; {result.residual:.1%} of the profile is not met")


def parse_lengths(text: str) -> list[float]:
    """Parse the value of `--sigma-rel`.

    Args:
        text: a length, several separated by commas, or a range `SHORTEST..LONGEST`.

    Returns:
        The lengths, in ascending order.

    Raises:
        ValueError: for anything else.

    Example:
        >>> parse_lengths("0.1,0.05"), len(parse_lengths("0.05..0.25"))
        ([0.05, 0.1], 9)
        >>> parse_lengths("long")
        Traceback (most recent call last):
        ValueError: --sigma-rel must be a length, several such as 0.05,0.1, or a range such as 0.05..0.25, got 'long'
    """
    try:
        if (match := RANGE.fullmatch(text)) is not None:
            first, last = float(match[1]), float(match[2])
            if not first < last:
                raise ValueError
            step = (last - first) / (LENGTHS_IN_RANGE - 1)
            return [round(first + index * step, 6) for index in range(LENGTHS_IN_RANGE)]
        return sorted({float(entry) for entry in text.split(",")})
    except ValueError:
        raise ValueError(
            f"--sigma-rel must be a length, several such as 0.05,0.1, or a range such as 0.05..0.25, got {shown(text)}"
        ) from None


def _search(
    averages: RunAverages,
    lengths: list[float],
    metric: str,
    source: Source,
    sampling: SamplingOptions,
    count: int,
    reference: ImageSet | None,
    features: str,
) -> Curve:
    """Evaluate the averages of several lengths."""
    from ddim.devices import choose_device
    from ddim.evaluation.curves import measure_curve
    from ddim.evaluation.image_sets import sample_image_set

    target = choose_device(source.device)

    def sample(length: float) -> ImageSet:
        pipe = averages.reconstruct(length).pipe.to(target)
        pipe.engine = source.engine
        name = f"{averages.checkpoint}, sigma_rel {length:g}"
        return sample_image_set(pipe, count, source.seed, name, **asdict(sampling.config(pipe)))

    curve = measure_curve("sigma_rel", lengths, sample, reference, features, [metric])
    curve.settings.update({"model": str(averages.checkpoint), "seed": source.seed} | asdict(sampling))
    return curve
