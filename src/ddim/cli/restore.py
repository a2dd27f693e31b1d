"""`ddim inpaint`, `ddim super-resolve` and `ddim restore`: images from measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddim.cli import options
from ddim.cli.common import (
    DEFAULT_MODEL,
    count_replaced,
    load_pipeline,
    parse_integers,
    read_images,
    report_result,
    save_results,
    show_images,
    split_model,
)
from ddim.cli.conditions import NO_CONDITIONS, ConditionOptions, takes_conditions
from ddim.validation import integer, pluralize, real, shown

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from PIL import Image
    from torch import Tensor

    from ddim.diffusion.operators import LinearOperator
    from ddim.outputs import RestoreOutput
    from ddim.pipeline import DDIMPipeline

OPERATORS = "gray, blur:STD, box:FACTOR or bicubic:FACTOR"

Out = Annotated[
    str,
    typer.Option(
        "--out",
        "-o",
        help="x.png shows, per row, what was given, the samples, and their mean; x.npz and a folder get the samples.",
    ),
]
Samples = Annotated[int, typer.Option("--count", "-n", help="Samples per image.")]
Seed = Annotated[int, typer.Option(help="Seed of the first sample's noise: seed + i for sample i.")]
Method = Annotated[
    str | None,
    typer.Option(
        help="ddnm, ddrm, repaint (inpainting), pigdm, mmps or dps; defaults to ddnm without noise, to mmps with noise."
    ),
]
Steps = Annotated[int | None, typer.Option(help="Number of steps; defaults to the method's own.")]
Resampling = Annotated[
    str | None,
    typer.Option(
        help="LENGTH,REPEATS: go back LENGTH steps, REPEATS - 1 times, as RePaint does; defaults to the method's own."
    ),
]
NoiseStd = Annotated[
    float, typer.Option(help="Standard deviation of the Gaussian noise in the images, on the scale of [-1, 1].")
]


@dataclass(frozen=True)
class RestorationOptions:
    """The options that the three commands share.

    Attributes:
        out: `--out`.
        count: `--count`, samples per image.
        seed: `--seed`.
        method: `--method`.
        steps: `--steps`.
        resampling: `--resampling`.
        scale: `--scale`.
    """

    out: str
    count: int
    seed: int
    method: str | None
    steps: int | None
    resampling: str | None
    scale: int | None

    def arguments(self, num_images: int) -> dict[str, Any]:
        """Return them as arguments of the library.

        Args:
            num_images: the number of images that were given.

        Raises:
            ValueError: if `--resampling` is not two integers.
        """
        resampling = None
        if self.resampling is not None:
            resampling = tuple(parse_integers(self.resampling, "--resampling", "10,10"))
        return {
            "method": self.method,
            "num_inference_steps": self.steps,
            "output_type": "np",
            "samples": self.count,
            "seeds": range(self.seed, self.seed + num_images * self.count),
            "resampling": resampling,
        }

    def check(self) -> Path:
        """Check what can be checked before a model is loaded, and return the path of the result.

        Raises:
            ValueError: for an option out of range, or an output that cannot be written.
        """
        from ddim.io.image_files import check_output_path
        from ddim.restoration import RestorationConfig

        target = check_output_path(self.out)
        integer("--count", self.count, 1)
        arguments = self.arguments(1)
        RestorationConfig(self.method or "ddnm", arguments["num_inference_steps"], resampling=arguments["resampling"])
        return target

    def write(self, target: Path, pipe: DDIMPipeline, given: Sequence[Image.Image], result: RestoreOutput) -> None:
        """Write the result and report it.

        Args:
            target: the path, as `check` returned it.
            pipe: the model.
            given: what was given, as it is shown, of the model's size.
            result: the samples, of the output type `np`.
        """
        from ddim.io.image_files import enlarge, is_folder_path, make_grid, save_image

        num_replaced = count_replaced(pipe, self.out, len(result.images))
        if target.suffix.lower() == ".png" and not is_folder_path(self.out):
            samples, means = show_images(pipe, result.images), show_images(pipe, result.mean)
            rows = [
                [image.convert(samples[0].mode), *samples[first : first + self.count]]
                + ([mean] if self.count > 1 else [])
                for image, mean, first in zip(given, means, range(0, len(samples), self.count), strict=True)
            ]
            grid = make_grid([cell for row in rows for cell in row], len(rows[0]))
            save_image(enlarge(grid, samples[0], self.scale), target)
        else:
            save_results(pipe, result.images, self.out)
        summary = f"{pluralize(len(result.images), 'image')}, {pluralize(result.nfe, 'function evaluation')} each"
        report_result(target, num_replaced, summary)


@takes_conditions
def inpaint(
    images: options.Images,
    mask: Annotated[
        str | None, typer.Option(help="Image of the model's size, white where pixels are missing; or a folder of such.")
    ] = None,
    box: Annotated[
        str | None, typer.Option(help="X,Y,WIDTH,HEIGHT of a missing rectangle, in pixels, instead of --mask.")
    ] = None,
    out: Out = "inpainted.png",
    count: Samples = 1,
    seed: Seed = 0,
    method: Method = None,
    model: options.ModelOption = None,
    weights: options.Weights = None,
    steps: Steps = None,
    resampling: Resampling = None,
    resize: options.Resize = False,
    scale: options.Scale = None,
    conditions: ConditionOptions = NO_CONDITIONS,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Fill in missing parts of images.

    Known pixels are those of the images. The path of the result is printed.

    Examples:
      ddim inpaint digit.png --box 7,7,14,14 --count 8

      ddim inpaint photo.png --mask hole.png --model my-model --out filled.png
    """
    import torch

    from ddim.restoration import read_masks

    shared = RestorationOptions(out, count, seed, method, steps, resampling, scale)
    target = shared.check()
    if (mask is None) == (box is None):
        raise ValueError("give either --mask or --box")
    name, paths = split_model(images, model, weights)
    originals = read_images(paths)
    masks = None if mask is None else [_as_image(image) for image in read_images([mask])]
    pipe = load_pipeline(name or DEFAULT_MODEL, device, dtype, engine)
    size = pipe.sample_shape[1:]
    missing = read_masks(masks if box is None else parse_box(box, size), len(originals), size, resize)
    result = pipe.inpaint(
        originals,
        missing,
        resize=resize,
        **shared.arguments(len(originals)),
        **conditions.condition(pipe, len(originals) * count),
    )
    known = result.images.reshape(len(originals), count, *result.images.shape[1:])[:, 0]
    middle = torch.as_tensor(known)
    middle = torch.where(missing[..., None], middle.double().mean().to(middle.dtype), middle)
    shared.write(target, pipe, show_images(pipe, middle.numpy()), result)


@takes_conditions
def super_resolve(
    images: options.Images,
    factor: Annotated[int, typer.Option(help="How many times smaller the images are than those of the model.")] = 4,
    kernel: Annotated[
        str, typer.Option(help="How they were made small: box (means of squares) or bicubic (as PIL does).")
    ] = "box",
    noise_std: NoiseStd = 0.0,
    out: Out = "super-resolved.png",
    count: Samples = 1,
    seed: Seed = 0,
    method: Method = None,
    model: options.ModelOption = None,
    weights: options.Weights = None,
    steps: Steps = None,
    resampling: Resampling = None,
    scale: options.Scale = None,
    conditions: ConditionOptions = NO_CONDITIONS,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Sample images of the model's size from small ones.

    The samples, made small again, are the images that were given. The path of the result is printed.

    Examples:
      ddim super-resolve small.png --factor 4 --count 8

      ddim super-resolve faces-16x16/ --model faces --kernel bicubic --out faces-64x64/
    """
    shared = RestorationOptions(out, count, seed, method, steps, resampling, scale)
    target = shared.check()
    name, paths = split_model(images, model, weights)
    small = read_images(paths)
    pipe = load_pipeline(name or DEFAULT_MODEL, device, dtype, engine)
    result = pipe.super_resolve(
        small,
        factor,
        kernel,
        noise_std,
        **shared.arguments(len(small)),
        **conditions.condition(pipe, len(small) * count),
    )
    shared.write(target, pipe, _fill(pipe, small, factor), result)


@takes_conditions
def restore(
    images: options.Images,
    operator: Annotated[
        str,
        typer.Option(
            help=f"What made the images: {OPERATORS}; STD of a Gaussian blur in pixels. Others: pipe.restore in Python."
        ),
    ],
    noise_std: NoiseStd = 0.0,
    simulate: Annotated[
        bool,
        typer.Option("--simulate", help="The images are clean: apply the operator and the noise first, to try it."),
    ] = False,
    out: Out = "restored.png",
    count: Samples = 1,
    seed: Seed = 0,
    method: Method = None,
    model: options.ModelOption = None,
    weights: options.Weights = None,
    steps: Steps = None,
    resampling: Resampling = None,
    resize: options.Resize = False,
    scale: options.Scale = None,
    conditions: ConditionOptions = NO_CONDITIONS,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    engine: options.Engine = "auto",
) -> None:
    """Sample images from blurred, gray, small or noisy ones.

    The path of the result is printed.

    Examples:
      ddim restore gray.png --operator gray --model faces --count 4

      ddim restore digit.png --operator blur:1.5 --noise-std 0.1 --simulate
    """
    import torch

    from ddim.io.images import to_samples

    shared = RestorationOptions(out, count, seed, method, steps, resampling, scale)
    target = shared.check()
    real("--noise-std", noise_std, 0, below=1e3)
    kind, number = parse_operator(operator)
    name, paths = split_model(images, model, weights)
    given = read_images(paths)
    pipe = load_pipeline(name or DEFAULT_MODEL, device, dtype, engine)
    measure = make_operator(pipe, kind, number)
    channels, height, width = pipe.sample_shape if simulate else measure.measurement_shape
    y = to_samples(given, channels, height, width, resize, pixel_format=pipe.pixel_format)
    if simulate:
        generator = torch.Generator().manual_seed(seed)
        y = measure(y)
        y = y + noise_std * torch.randn(y.shape, generator=generator)
    result = pipe.restore(
        y.to(pipe.device),
        measure,
        noise_std,
        **shared.arguments(len(given)),
        **conditions.condition(pipe, len(given) * count),
    )
    shared.write(target, pipe, _show_measurement(pipe, y), result)


def parse_box(text: str, size: tuple[int, int]) -> Tensor:
    """Parse the value of `--box`.

    Args:
        text: x, y, width and height, such as `7,7,14,14`.
        size: (H, W) of the images.

    Returns:
        Boolean (H, W), true within the rectangle.

    Raises:
        ValueError: for anything else, or a rectangle that is not within the images.

    Example:
        >>> int(parse_box("1,0,2,3", (4, 4)).sum())
        6
    """
    import torch

    numbers = parse_integers(text, "--box", "7,7,14,14")
    H, W = size
    if len(numbers) != 4:
        raise ValueError(f"--box must be X,Y,WIDTH,HEIGHT, such as 7,7,14,14, got {shown(text)}")
    x, y, width, height = numbers
    if min(width, height) < 1:
        raise ValueError(f"--box must have a width and a height of at least 1, got {shown(text)}")
    if min(x, y) < 0 or x + width > W or y + height > H:
        raise ValueError(f"--box must lie within the model's {W} x {H} pixels, got {shown(text)}")
    if (width, height) == (W, H):
        raise ValueError(f"--box must leave some of the model's {W} x {H} pixels, got {shown(text)}")
    missing = torch.zeros(size, dtype=torch.bool)
    missing[y : y + height, x : x + width] = True
    return missing


def parse_operator(text: str) -> tuple[str, float | None]:
    """Parse the value of `--operator`.

    Args:
        text: such as `gray` or `blur:1.5`.

    Returns:
        The name, and the number after it.

    Raises:
        ValueError: for anything else.

    Example:
        >>> parse_operator("box:4")
        ('box', 4.0)
    """
    name, _, number = text.partition(":")
    try:
        value = float(number) if number else None
    except ValueError:
        value = float("nan")
    is_whole = name == "blur" or (value is not None and value == int(value if abs(value) < 1e6 else 0))
    if (name == "gray" and not number) or (name in ("blur", "box", "bicubic") and value and value > 0 and is_whole):
        return name, value
    raise ValueError(f"--operator must be {OPERATORS}, got {shown(text)}")


def make_operator(pipe: DDIMPipeline, name: str, number: float | None) -> LinearOperator:
    """Return an operator for a model's images.

    Args:
        pipe: the model.
        name: as `parse_operator` returns it.
        number: as `parse_operator` returns it.

    Raises:
        ValueError: if the model's images do not have it: gray ones no colors, a factor that does not divide their size.
    """
    from ddim.diffusion.operators import BicubicDownsample, BoxDownsample, GaussianBlur, Grayscale

    if name == "gray":
        return Grayscale(pipe.sample_shape)
    assert number is not None
    if name == "blur":
        return GaussianBlur(pipe.sample_shape, number)
    return (BoxDownsample if name == "box" else BicubicDownsample)(pipe.sample_shape, int(number))


def _as_image(image: Image.Image | np.ndarray) -> Image.Image:
    from PIL import Image as Images

    if isinstance(image, Images.Image):
        return image
    return Images.fromarray(image.astype("uint8") * 255 if image.dtype == bool else image)


def _fill(pipe: DDIMPipeline, small: Sequence[Image.Image | np.ndarray], factor: int) -> list[Image.Image]:
    """Return small images at the model's size, each pixel a square, as they are shown."""
    from ddim.io.images import to_samples

    C, H, W = pipe.sample_shape
    y = to_samples(list(small), C, H // factor, W // factor, pixel_format=pipe.pixel_format)
    return _show_measurement(pipe, y)


def _show_measurement(pipe: DDIMPipeline, y: Tensor) -> list[Image.Image]:
    """Return measurements that are images, at the model's size, each pixel a square, as they are shown."""
    from ddim.io.images import to_output

    C, H, _ = pipe.sample_shape
    factor = H // y.shape[2]
    shown_y = y.expand(-1, C, -1, -1) if y.shape[1] == 1 else y
    enlarged = shown_y.repeat_interleave(factor, 2).repeat_interleave(factor, 3).clamp(-1, 1)
    return show_images(pipe, to_output(enlarged, "np", pipe.pixel_format))
