"""`ddim evaluate`: the quality of images, in numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim.cli import options
from ddim.cli.checks import refuse_sampling_options
from ddim.cli.common import SamplingOptions, choose_model, load_pipeline, parse_integers, with_spacing
from ddim.cli.conditions import NO_CONDITIONS, ConditionOptions, takes_conditions
from ddim.validation import pluralize, shown

if TYPE_CHECKING:
    from ddim.evaluation.image_sets import ImageSet
    from ddim.evaluation.memorization import Memorization

PLOT_SUFFIXES = {".png": "a plot", ".svg": "a plot"}
DEFAULT_FEATURES = "pixels"
"""They require neither a download nor an optional package."""


@takes_conditions
def evaluate(
    ctx: typer.Context,
    samples: Annotated[
        str | None,
        typer.Argument(
            show_default=False,
            help="What to evaluate: a model (mnist, faces, a folder), which generates --count images; or images: a "
            "folder, an .npz or parquet file, tar shards, a data set.",
        ),
    ] = None,
    model: options.ModelOption = None,
    weights: options.Weights = None,
    reference: Annotated[
        str | None,
        typer.Option(help="What to compare with: images, or a model; required by all metrics but the inception score."),
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="Metrics, separated by commas: fid, kid, is, precision, recall.")
    ] = "fid,kid,precision,recall",
    features: Annotated[
        str,
        typer.Option(
            help="Features to compare by: pixels, mnist (a classifier of digits), faces (a classifier of drawn faces), "
            "inception (published distances; requires pip install 'ddim[inception]'), or a TorchScript file."
        ),
    ] = DEFAULT_FEATURES,
    count: Annotated[
        int | None,
        typer.Option("--count", "-n", help="Number of images; defaults to 10000 of a model and to all of files."),
    ] = None,
    reference_count: Annotated[
        int | None, typer.Option(help="Number of images of the reference; defaults to all.")
    ] = None,
    attributes: Annotated[
        bool,
        typer.Option(
            "--attributes",
            help="Also report how frequent the values of each attribute are; requires features that recognize "
            "attributes: mnist or faces.",
        ),
    ] = False,
    per_class: Annotated[
        bool,
        typer.Option(
            "--per-class",
            help="Also report each class: the share of its samples that are recognized as it, and their Fréchet "
            "distance to its images; requires labels of the samples, such as --label all, and of the reference.",
        ),
    ] = False,
    memorization: Annotated[
        bool,
        typer.Option(
            "--memorization",
            help="Report instead how near samples are to the training images, which are the --reference, and how near "
            "held-out images are.",
        ),
    ] = False,
    held_out: Annotated[
        str | None,
        typer.Option(help="Images not trained on, for --memorization; defaults to training images, drawn at random."),
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(
            help="With --memorization, a .png file of the samples nearest to training images, each above the image "
            "that it is near to."
        ),
    ] = None,
    every_checkpoint: Annotated[
        bool,
        typer.Option(
            "--every-checkpoint",
            help="Evaluate every checkpoint that a training run has kept, instead of its result: a curve.",
        ),
    ] = False,
    split: Annotated[str, typer.Option(help="Split of data sets on the hub.")] = "train",
    table: Annotated[
        int | None,
        typer.Option(
            help="Table of the paper: 1 (Fréchet distance by steps and eta), 2 (error of encoding and decoding) or 3 "
            "(as 1, for LSUN)."
        ),
    ] = None,
    figure: Annotated[int | None, typer.Option(help="Figure of the paper: 4 (time and quality by steps).")] = None,
    table_steps: Annotated[
        str | None, typer.Option(help="Numbers of steps of the table, such as 10,20,50; defaults to the paper's.")
    ] = None,
    steps: options.Steps = 50,
    eta: options.Eta = 0.0,
    seed: options.Seed = 0,
    spacing: options.Spacing = None,
    timesteps: options.Timesteps = None,
    order: options.Order = None,
    sigma_hat: options.SigmaHat = False,
    clipped_model_output: options.ClippedModelOutput = False,
    conditions: ConditionOptions = NO_CONDITIONS,
    out: Annotated[
        list[str] | None,
        typer.Option(
            "--out",
            "-o",
            help="Also write the result to a .json, .csv or .md file, a table to .json, .md, or as a plot to .png or "
            ".svg, distances of --memorization also as histograms, and the curve of --every-checkpoint also as a plot "
            "to .png or .svg; can be repeated.",
        ),
    ] = None,
    device: options.Device = "auto",
    engine: options.Engine = "auto",
) -> None:
    """Evaluate images by their statistics: Fréchet and kernel distance, inception score, precision and recall.

    A table is printed, with everything that changes the numbers. Only numbers of inception features can be compared
    with published ones.

    Examples:
      ddim evaluate mnist --reference mnist/test.parquet --features mnist -n 2000

      ddim evaluate images/ --reference owner/dataset --metrics fid,kid

      ddim evaluate samples.npz --metrics is --features mnist --out score.json --out score.md

      ddim evaluate mnist --reference mnist/test.parquet --features mnist -n 500 --table 1 --out t.md --out t.png

      ddim evaluate mnist --reference mnist/train.parquet --memorization -n 1000 --out distances.png

      ddim evaluate runs/digits --reference digits --label all --guidance 1.5 -n 1000 --per-class

      ddim evaluate runs/mine --every-checkpoint --reference images/ -n 500 --metrics fid --out curve.png

      torchrun --nproc-per-node 8 -m ddim evaluate my-model --reference owner/dataset -n 50000
    """
    from ddim import distributed
    from ddim.evaluation import report
    from ddim.evaluation.memorization import draw_pairs, measure_memorization, plot_distances
    from ddim.io.image_files import check_output_path, save_image

    if samples is None and model is None:
        raise ValueError("give what to evaluate: a model, or images")
    samples = choose_model(samples, model, weights=weights)
    source = Source(distributed.local_device(device), engine, split, seed, None if model is None else samples)
    if weights is not None and not source.is_model(samples):
        raise ValueError("--weights requires a model as what is evaluated")
    if conditions != NO_CONDITIONS and not source.is_model(samples):
        raise ValueError("--label and the options of guidance require a model as what is evaluated")
    if per_class and (memorization or every_checkpoint or table is not None or figure is not None):
        raise ValueError("--per-class excludes --memorization, --every-checkpoint, --table and --figure")
    if per_class and reference is None:
        raise ValueError("--per-class requires labeled images as the --reference")
    if table is not None or figure is not None:
        if conditions != NO_CONDITIONS:
            raise ValueError("--table and --figure sample from all classes; leave --label and guidance out")
        if (table, figure) not in ((1, None), (2, None), (3, None), (None, 4)):
            raise ValueError("give one of --table 1, --table 2, --table 3 and --figure 4")
        if reference is None:
            raise ValueError("--table and --figure require images as the --reference")
        numbers_of_steps = None if table_steps is None else parse_integers(table_steps, "--table-steps", "10,20,50")
        paper = PaperTable(table, figure, numbers_of_steps, spacing, features)
        paper.evaluate(source, samples, count, reference, reference_count, out or [])
        return
    if table_steps is not None:
        raise ValueError("--table-steps requires --table or --figure")
    names = [name.strip() for name in metrics.split(",")]
    outputs = report.check_outputs(out or [], PLOT_SUFFIXES if memorization or every_checkpoint else {})
    if pairs is not None:
        check_output_path(pairs, {".png": ""}, False, "--pairs")
    sampling = SamplingOptions.parse(
        steps,
        spacing,
        timesteps,
        eta=eta,
        order=order,
        sigma_hat=sigma_hat,
        clipped_model_output=clipped_model_output,
    )
    if not (source.is_model(samples) or (reference is not None and source.is_model(reference))):
        refuse_sampling_options(ctx, "on images of files")
    source = replace(source, conditions=conditions)
    sample_set = source.open(samples, sampling, count, None)
    reference_set = None
    if reference is not None:
        of_reference = replace(source, conditions=NO_CONDITIONS)
        reference_set = of_reference.open(reference, sampling, reference_count, sample_set)
    if every_checkpoint:
        _evaluate_checkpoints(source, samples, sampling, count, reference_set, features, names, outputs)
        return
    held_out_set = None if held_out is None else source.open(held_out, sampling, None, sample_set)
    distances: Memorization | None = None
    with distributed.init() as group:
        if memorization:
            distances, result = measure_memorization(sample_set, reference_set, held_out_set, features, group)
        else:
            result = report.evaluate(sample_set, reference_set, features, names, group, attributes, per_class)
    if not group.is_main:
        return
    if source.is_model(samples):
        result["settings"] |= {
            "num_inference_steps": steps,
            "eta": eta,
            "order": order,
            "use_sigma_hat": sigma_hat,
            "timesteps": sampling.timesteps,
            "seed": seed,
            "spacing": spacing,
        } | ({"use_clipped_model_output": True} if clipped_model_output else {})
        result["settings"] |= {
            name: value for name, value in asdict(conditions).items() if value != getattr(NO_CONDITIONS, name)
        }
    for path in outputs:
        if Path(path).suffix.lower() in report.REPORT_SUFFIXES:
            report.write_report(result, Path(path))
        elif distances is not None:
            plot_distances(distances, Path(path))
    if pairs is not None and distances is not None and reference_set is not None:
        save_image(draw_pairs(distances, reference_set), pairs)
    print(report.format_table(result))
    print(f"compared by the features {features}{'' if memorization else _comparability(features)}", file=sys.stderr)
    for path in (*outputs, *([] if pairs is None else [pairs])):
        print(f"also in {path}", file=sys.stderr)


def _evaluate_checkpoints(
    source: Source,
    run: str,
    sampling: SamplingOptions,
    count: int | None,
    reference: ImageSet | None,
    features: str,
    metrics: Sequence[str],
    outputs: Sequence[str],
) -> None:
    """Evaluate every checkpoint of a run, write the curve and print it."""
    from ddim import distributed
    from ddim.evaluation.curves import measure_curve, write_curve
    from ddim.io.runs import CHECKPOINTS, checkpoint_step, list_checkpoints, split_variant

    folder, variant = split_variant(run)
    checkpoints = {checkpoint_step(path): path for path in reversed(list_checkpoints(Path(folder) / CHECKPOINTS))}
    if not checkpoints:
        raise ValueError(f"--every-checkpoint requires a training run with checkpoints, got {shown(run)}")
    suffix = "" if variant is None else f"@{variant}"

    def sample(step: float) -> ImageSet:
        return source.open(f"{checkpoints[int(step)]}{suffix}", sampling, count, None)

    with distributed.init() as group:
        curve = measure_curve("step", checkpoints, sample, reference, features, metrics, group)
    if not group.is_main:
        return
    given = {name: v for name, v in asdict(source.conditions).items() if v != getattr(NO_CONDITIONS, name)}
    curve.settings.update({"model": run, "seed": source.seed} | asdict(sampling) | given)
    for path in outputs:
        write_curve(curve, Path(path))
    print(curve.table())
    print(
        f"{pluralize(len(checkpoints), 'checkpoint')}; a run keeps its newest ones, and with checkpoints.keep_every "
        "others as well",
        file=sys.stderr,
    )
    for path in outputs:
        print(f"also in {path}", file=sys.stderr)


def _comparability(features: str) -> str:
    return "" if features == "inception" else ", whose distances are not those of published figures (inception)"


@dataclass(frozen=True)
class Source:
    """How images are opened or generated.

    Attributes:
        device: of the process.
        engine: how networks run.
        split: of data sets on the hub.
        seed: of the first generated image.
        model: the value of `--model`, which makes a hub id one of a model rather than of a data set.
        conditions: classes and guidance of generated images.
    """

    device: str
    engine: str
    split: str
    seed: int
    model: str | None = None
    conditions: ConditionOptions = NO_CONDITIONS

    def is_model(self, name: str) -> bool:
        """Return whether a name means a model rather than images.

        Args:
            name: a model, or where images are.
        """
        from ddim.io.hub import is_model

        return name == self.model or is_model(name)

    def open(self, name: str, sampling: SamplingOptions, count: int | None, like: ImageSet | None) -> ImageSet:
        """Open a set of images.

        Args:
            name: a model, or where images are.
            sampling: how a model samples.
            count: number of images; `None` for 10000 of a model, for all of files.
            like: the set to whose shape and type of values images of files are fitted; `None` for those of the first.

        Returns:
            The set.

        Raises:
            FileNotFoundError: if the images do not exist.
            ValueError: if they cannot be read, or an option is out of range.
        """
        from ddim.evaluation.image_sets import open_files, sample_image_set

        if not self.is_model(name):
            if like is None:
                return open_files(name, count, None, self.split)
            return open_files(name, count, like.shape, self.split, like.pixel_format)
        pipe = load_pipeline(name, self.device, engine=self.engine, takes_discrete=True)
        count = 10_000 if count is None else count
        settings: dict[str, Any] = asdict(sampling.config(pipe))
        if self.conditions != NO_CONDITIONS:
            settings |= self.conditions.condition(pipe, count)
        return sample_image_set(pipe, count, self.seed, name, **settings)


@dataclass(frozen=True)
class PaperTable:
    """A table or a figure of the paper.

    Attributes:
        table: 1, 2, 3, or `None` for the figure.
        figure: 4, or `None` for a table.
        numbers_of_steps: of its rows; `None` for the paper's.
        spacing: of the timesteps; `None` for the model's own, and for quadratic ones on CIFAR's shape.
        features: by which tables compare, as `ddim.evaluation.features.load_features` takes them.
    """

    table: int | None
    figure: int | None
    numbers_of_steps: list[int] | None
    spacing: str | None
    features: str

    def evaluate(
        self,
        source: Source,
        model: str,
        count: int | None,
        reference: str,
        reference_count: int | None,
        out: Sequence[str],
    ) -> None:
        """Compute it, write it to files and print it.

        Args:
            source: how images are opened.
            model: a built-in model or a folder.
            count: number of images; `None` for 256 of table 2 and 50000 of the others.
            reference: where the data's images are.
            reference_count: number of images of the data; `None` for all.
            out: files to write: `.json`, `.md`, `.png` or `.svg`.

        Raises:
            FileNotFoundError: if the images do not exist.
            ValueError: if an argument is out of range.
        """
        from ddim import distributed
        from ddim.evaluation import paper_tables
        from ddim.evaluation.features import load_features
        from ddim.evaluation.image_sets import open_files
        from ddim.io.image_files import check_output_path

        if not source.is_model(model):
            raise ValueError(f"the paper's tables require a model, got {model}")
        for path in out:
            check_output_path(path, {".json": "", ".md": "Markdown"} | PLOT_SUFFIXES, False)
        pipe = load_pipeline(model, source.device, engine=source.engine)
        spacing = "quad" if self.spacing is None and pipe.sample_shape == paper_tables.CIFAR_SHAPE else self.spacing
        pipe = with_spacing(pipe, spacing)
        kind = pipe.sample_shape, source.split, pipe.pixel_format
        with distributed.init() as group:
            if self.table == 2:
                pipe.set_progress_bar_config(disable=True)
                images = open_files(reference, 256 if count is None else count, *kind)
                result = paper_tables.table_2(pipe, images, self.numbers_of_steps or paper_tables.TABLE_2_STEPS, group)
            else:
                data = open_files(reference, reference_count, *kind)
                extractor = load_features(self.features, pipe.sample_shape, pipe.pixel_format)
                count = 50_000 if count is None else count
                make, default_steps = {
                    1: (paper_tables.table_1, paper_tables.TABLE_1_STEPS),
                    3: (paper_tables.table_3, paper_tables.TABLE_3_STEPS),
                    None: (paper_tables.figure_4, paper_tables.TABLE_1_STEPS),
                }[self.table]
                numbers_of_steps = self.numbers_of_steps or default_steps
                result = make(pipe, data, extractor, count, source.seed, numbers_of_steps, group)
        if group.is_main:
            for path in out:
                _write(result, path)
            print(result.markdown(), end="")


def _write(result: Any, path: str) -> None:
    """Write a table of the paper in the format of the path's suffix."""
    from ddim.evaluation import paper_tables
    from ddim.io.atomic import atomic_write
    from ddim.io.json_files import to_json

    if path.endswith((".png", ".svg")):
        paper_tables.plot(result, Path(path))
        return
    with atomic_write(Path(path)) as temporary:
        text = result.markdown() if path.endswith(".md") else to_json(result.json())
        temporary.write_text(text, encoding="utf-8")
