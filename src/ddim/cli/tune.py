"""`ddim tune`: the timesteps that suit a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ddim.cli import options
from ddim.cli.common import choose_model, load_pipeline, parse_integers, report_result
from ddim.cli.conditions import NO_CONDITIONS, ConditionOptions, takes_conditions
from ddim.validation import pluralize

if TYPE_CHECKING:
    from ddim.latents import Condition
    from ddim.pipeline import DDIMPipeline


@takes_conditions
def tune(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A built-in model (mnist, mnist-labels, faces), a folder, or a hub id.", show_default=False
        ),
    ] = None,
    *,
    out: Annotated[
        str,
        typer.Option(
            "--out", "-o", help="Folder for the pipeline with the timesteps; the MODEL's own folder to add to it."
        ),
    ],
    model_option: options.ModelOption = None,
    weights: options.Weights = None,
    steps: Annotated[str, typer.Option(help="Numbers of steps, such as 10 or 5,10,20.")] = "10",
    order: Annotated[
        int, typer.Option(help="Order of the method: 1 is DDIM, 2 to 4 use as many of the last predictions.")
    ] = 2,
    eta: options.Eta = 0.0,
    coefficients: Annotated[
        bool,
        typer.Option(
            "--coefficients",
            help="Learn the weights of the last predictions and the network's timesteps, too: smaller errors in few "
            "steps, up to 20.",
        ),
    ] = False,
    codes: Annotated[
        int | None,
        typer.Option(
            help="Number of latents for the search; as many others measure its result. Defaults to 64, with "
            "--coefficients to 32."
        ),
    ] = None,
    seed: options.Seed = 0,
    plot: Annotated[str | None, typer.Option(help="Plot the timesteps into this .png or .svg file as well.")] = None,
    batch_size: Annotated[int, typer.Option(help="Latents per network call.")] = 64,
    conditions: ConditionOptions = NO_CONDITIONS,
    device: options.Device = "auto",
    engine: options.Engine = "auto",
) -> None:
    """Search for the timesteps, or the coefficients, with the smallest error, and save the model with them.

    For each number of steps a table is printed: the mean squared error, in [0, 1], to images of very many steps, with
    each spacing and with the learned timesteps, on latents that the search has not seen; then the timesteps. The last
    line is the folder. An interrupted search resumes.

    Examples:
      ddim tune mnist --steps 10 --out mnist-tuned

      ddim tune my-model --steps 5,10,20 --out my-model --plot timesteps.png

      ddim tune mnist --steps 5,10 --coefficients --out mnist-tuned

      ddim tune runs/digits --label all --guidance 1.5 --out digits-tuned

      ddim sample --model mnist-tuned --steps 10
    """
    from ddim.io.atomic import is_vacant
    from ddim.io.hub import MODEL_INDEX
    from ddim.io.image_files import check_output_path
    from ddim.io.runs import refuse_run
    from ddim.tuning import NUM_LATENTS, draw_timesteps, plot_timesteps
    from ddim.tuning import tune as search

    name = choose_model(model, model_option, weights=weights)
    numbers_of_steps = parse_integers(steps, "--steps", "5,10,20")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, not a folder")
    refuse_run(folder)
    is_own = folder.exists() and Path(name).is_dir() and folder.samefile(name)
    if not is_vacant(folder) and not is_own:
        if (folder / MODEL_INDEX).exists():
            raise FileExistsError(f"{out} holds a pipeline; give another --out, or give it as the MODEL to add to it")
        raise FileExistsError(f"{out} is not empty; give another --out")
    plot_path = None
    if plot is not None:
        plot_path = check_output_path(plot, {".png": "", ".svg": ""}, folder_allowed=False, name="plot")
    pipe = load_pipeline(name, device, engine=engine)
    condition = conditions.condition(pipe, conditions.num_labels(pipe))
    if coefficients:
        for num_steps in numbers_of_steps:
            _learn(pipe, num_steps, codes, seed, batch_size, condition)
        pipe.save_pretrained(folder)
        report_result(folder, 0, f"coefficients of {pluralize(len(numbers_of_steps), 'number')} of steps")
        return
    plotted: dict[str, list[int]] = {}
    num_latents = NUM_LATENTS if codes is None else codes
    for num_steps in numbers_of_steps:
        result = search(
            pipe, num_steps, order, eta, num_latents=num_latents, seed=seed, batch_size=batch_size, **condition
        )
        smallest = min(result.classic.values())
        print(f"{pluralize(num_steps, 'step')}, order {order}, eta {eta:g}")
        errors = {"learned": result.error, **result.classic}
        for name, error in sorted(errors.items(), key=lambda entry: entry[1]):
            print(f"  {name:<10}{error:.3e}")
        print(f"  learned timesteps have {result.error / smallest:.0%} of the smallest error of the spacings")
        by_name = {"learned": result.timesteps}
        by_name |= {name: pipe.scheduler.make_timesteps(num_steps, name) for name in result.classic}
        print(draw_timesteps(by_name, len(pipe.scheduler)))
        print(f"timesteps {','.join(map(str, result.timesteps))}", flush=True)
        plotted |= {f"{name}, {num_steps}": timesteps for name, timesteps in by_name.items()}
        pipe.scheduler = result.added_to(pipe.scheduler)
    if plot_path is not None:
        plot_timesteps(plotted, plot_path)
        print(f"also in {plot_path}", file=sys.stderr)
    pipe.save_pretrained(folder)
    report_result(folder, 0, f"{pluralize(len(numbers_of_steps), 'list')} of timesteps")


def _learn(
    pipe: DDIMPipeline, num_steps: int, codes: int | None, seed: int, batch_size: int, condition: Condition
) -> None:
    """Learn the coefficients of a number of steps, print their errors, and add them to a pipeline's scheduler."""
    from ddim.coefficients import NUM_LATENTS, learn

    num_latents = NUM_LATENTS if codes is None else codes
    result = learn(pipe, num_steps, num_latents=num_latents, seed=seed, batch_size=batch_size, **condition)
    print(f"{pluralize(num_steps, 'step')}, {result.evaluations:,} function evaluations")
    for name, error in sorted({"learned": result.error, **result.others}.items(), key=lambda entry: entry[1]):
        print(f"  {name:<18}{error:.3e}")
    smallest = min(result.others.values())
    print(f"  learned coefficients have {result.error / smallest:.0%} of the smallest error of the others")
    for row in result.rows:
        weights = " ".join(f"{weight:+.4f}" for weight in row[2:])
        print(f"  t {row[0]:>4}, network at {row[1]:>4}, weights {weights}", flush=True)
    pipe.scheduler = result.added_to(pipe.scheduler)
