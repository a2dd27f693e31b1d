"""Options that several commands share: one name and one meaning each."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="A built-in model (mnist), a folder, or a hub id such as google/ddpm-cifar10-32."
    ),
]
Steps = Annotated[int, typer.Option(help="Network evaluations a picture: fewer are faster, more are finer.")]
Eta = Annotated[float, typer.Option(help="0 is DDIM, 1 is DDPM; between them, some noise in each step.")]
Spacing = Annotated[
    str | None,
    typer.Option(
        help="Of the timesteps: leading, trailing, linspace, quad, logsnr, blend; the model's, learned ones before "
        "others, unless given."
    ),
]
Timesteps = Annotated[str | None, typer.Option(help="A list of one's own in place of --steps, such as 900,600,300,0.")]
Order = Annotated[
    int | None,
    typer.Option(
        help="Of the method: 1 is DDIM, 2 uses the last two predictions at the same cost (on blend timesteps where the "
        "model's are leading); the model's own unless given."
    ),
]
Count = Annotated[int, typer.Option("--count", "-n", help="How many pictures.")]
Seed = Annotated[int, typer.Option(help="Picture i is painted from seed + i, whatever the batch.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]
Engine = Annotated[
    str,
    typer.Option(help="auto runs the network as fast as it can, eager as it is, compile by torch.compile."),
]
Dtype = Annotated[str, typer.Option(help="Of the network: float32, bfloat16 or float16.")]

Images = Annotated[list[str], typer.Argument(help="Images, or folders of them.", show_default=False)]
Resize = Annotated[
    bool, typer.Option("--resize", help="Crop, scale and convert images that are not of the model's size and mode.")
]
Exact = Annotated[
    bool, typer.Option("--exact/--euler", help="Solve each step's equation, or take the paper's Euler step.")
]
Tolerance = Annotated[float, typer.Option(help="A step is solved when its residual is at most this.")]
MaxIterations = Annotated[int, typer.Option(help="Network evaluations a step and image, at most.")]
InverseBatch = Annotated[
    int, typer.Option("--batch-size", help="Images the network sees at once; more are faster on a GPU.")
]
Fps = Annotated[float, typer.Option(help="Frames a second, of animations.")]
Force = Annotated[bool, typer.Option("--force", help="Take codes that other settings made.")]
