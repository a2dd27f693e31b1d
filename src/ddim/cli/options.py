"""Options that several commands share: one name and one meaning each."""

from __future__ import annotations

from typing import Annotated

import typer

ModelArgument = Annotated[str | None, typer.Argument(help="The model, as for --model.", show_default=False)]
"""Of commands without other arguments."""
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A built-in model (mnist, mnist-labels, faces), a folder, a training run or one of its checkpoints "
        "(RUN@raw: the weights being trained), or a hub id such as google/ddpm-cifar10-32; may also stand among the "
        "arguments, without the option.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Weights of a training run or of one of its checkpoints: ema (averaged; the default) or raw (those being "
        "trained); the same as a model's name with @raw.",
        show_default=False,
    ),
]
Steps = Annotated[int, typer.Option(help="Number of function evaluations per image: fewer is faster, more is finer.")]
LatentSteps = Annotated[
    int | None, typer.Option(help="Number of function evaluations per image; defaults to that of the latents, or 50.")
]
Eta = Annotated[float, typer.Option(help="0 is DDIM, 1 is DDPM; values between add some noise in each step.")]
Spacing = Annotated[
    str | None,
    typer.Option(
        help="Spacing of the timesteps: leading, trailing, linspace, quad, logsnr or blend; defaults to the model's "
        "learned timesteps, or else to the model's spacing."
    ),
]
Timesteps = Annotated[str | None, typer.Option(help="Custom timesteps instead of --steps, such as 900,600,300,0.")]
Order = Annotated[
    int | None,
    typer.Option(
        help="Order of the method: 1 is DDIM, 2 to 4 use as many of the last predictions at the same cost (with blend "
        "timesteps if the model's are leading); defaults to the model's."
    ),
]
SigmaHat = Annotated[bool, typer.Option("--sigma-hat", help="Add noise with DDPM's larger variance; requires --eta 1.")]
ClippedModelOutput = Annotated[
    bool,
    typer.Option(
        "--use-clipped-model-output", help="Recompute epsilon from the clipped x_0 in each step, as OpenAI's code does."
    ),
]
Count = Annotated[int, typer.Option("--count", "-n", help="Number of images.")]
Seed = Annotated[int, typer.Option(help="Seed of the first image: image i depends on seed + i alone.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto uses a GPU if there is one.")]
Engine = Annotated[
    str,
    typer.Option(
        help="How the network runs: eager is plain PyTorch, compile is torch.compile, auto is the fastest available."
    ),
]
Dtype = Annotated[str, typer.Option(help="Data type of the network: float32, bfloat16 or float16.")]

OverwriteModel = Annotated[bool, typer.Option("--overwrite", help="Replace the model in a folder that is not empty.")]

Images = Annotated[list[str], typer.Argument(help="Images, or folders of images.", show_default=False)]
Resize = Annotated[
    bool, typer.Option("--resize", help="Crop, scale and convert images that do not have the model's size and mode.")
]
Exact = Annotated[
    bool, typer.Option("--exact/--euler", help="Solve each step's equation, or take the paper's Euler step.")
]
Tolerance = Annotated[float, typer.Option(help="Largest residual at which a step counts as solved.")]
MaxIterations = Annotated[int, typer.Option(help="Maximum number of function evaluations per step and image.")]
LatentBatchSize = Annotated[int, typer.Option("--batch-size", help="Images per network call; more is faster on a GPU.")]
Scale = Annotated[
    int | None,
    typer.Option(
        help="Factor by which grids and animations are enlarged, each pixel to a square; defaults to what shows each "
        "image at 64 pixels or more. Single images, folders and x.npz keep their size without it."
    ),
]
Fps = Annotated[float, typer.Option(help="Frames per second of animations.")]
Force = Annotated[bool, typer.Option("--force", help="Accept latents that other settings made.")]
