"""`ddim tune`: the timesteps that suit a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ddim.cli import options
from ddim.cli.common import finish, load_pipeline, number, parse_timesteps


def tune(
    model: Annotated[str, typer.Argument(help="A built-in model (mnist), a folder, or a hub id.", show_default=False)],
    out: Annotated[
        str, typer.Option("--out", "-o", help="The folder for the pipeline with the timesteps; MODEL to add to it.")
    ],
    steps: Annotated[str, typer.Option(help="Numbers of steps, such as 10 or 5,10,20.")] = "10",
    order: Annotated[int, typer.Option(help="Of the method: 1 is DDIM, 2 uses the last two predictions.")] = 2,
    eta: options.Eta = 0.0,
    codes: Annotated[int, typer.Option(help="Codes that the search looks at; as many others judge the result.")] = 64,
    seed: options.Seed = 0,
    plot: Annotated[str | None, typer.Option(help="Draw the timesteps into a .png or .svg besides.")] = None,
    batch_size: Annotated[int, typer.Option(help="Codes that the network sees at once.")] = 64,
    device: options.Device = "auto",
    engine: options.Engine = "auto",
) -> None:
    """Find the timesteps with the least error, and save the model with them.

    For each number of steps a table is printed: the mean squared error, in [0, 1], of pictures to those of very many
    steps, with the spacings and with the timesteps found, on codes that the search has not seen; then the timesteps.
    The last line is the folder. A search that was stopped goes on.

    Examples:

      ddim tune mnist --steps 10 --out mnist-tuned

      ddim tune my-model --steps 5,10,20 --out my-model --plot timesteps.png

      ddim sample --model mnist-tuned --steps 10
    """
    from ddim.io.hub import MODEL_INDEX
    from ddim.io.images import check_output_path
    from ddim.tuning import draw_timesteps, plot_timesteps
    from ddim.tuning import tune as search

    numbers = parse_timesteps(steps, "--steps") or []
    folder = Path(out)
    if (folder / MODEL_INDEX).exists() and not (Path(model).is_dir() and folder.samefile(model)):
        raise FileExistsError(f"{out} holds a pipeline; give another --out, or give it as the MODEL to add to it")
    drawing = None if plot is None else check_output_path(plot, {".png": "", ".svg": ""}, folder_allowed=False)
    pipe = load_pipeline(model, device, engine=engine)
    lists: dict[str, list[int]] = {}
    for count in numbers:
        found = search(pipe, count, order, eta, num_latents=codes, seed=seed, batch_size=batch_size)
        best = min(found.classic.values())
        print(f"{number(count, 'step')}, order {order}, eta {eta:g}")
        for name, error in sorted({"learned": found.error, **found.classic}.items(), key=lambda entry: entry[1]):
            print(f"  {name:<10}{error:.3e}")
        print(f"  learned timesteps have {found.error / best:.0%} of the least error of the others")
        learned = {"learned": found.timesteps}
        drawn = learned | {name: pipe.scheduler.make_timesteps(count, name) for name in found.classic}
        print(draw_timesteps(drawn, len(pipe.scheduler)))
        print(f"timesteps {','.join(map(str, found.timesteps))}", flush=True)
        lists |= {f"{name}, {count}": chosen for name, chosen in drawn.items()}
        pipe.scheduler = found.added_to(pipe.scheduler)
    if drawing is not None:
        plot_timesteps(lists, drawing)
        print(f"also in {drawing}", file=sys.stderr)
    pipe.save_pretrained(folder)
    finish(folder, 0, f"{number(len(numbers), 'list')} of timesteps")
