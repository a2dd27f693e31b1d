"""What several commands do: load a model, read images, choose timesteps, report what was written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ddim.diffusion.sampling_config import SamplingConfig
from ddim.validation import choice, pluralize, real, shown

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ddim.io.latent_files import LatentSettings
    from ddim.pipeline import DDIMPipeline, ImagePipeline

DEFAULT_MODEL = "mnist"
PIPELINE_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
)
"""Of a pipeline's folder; those that exist are counted as replaced."""


@dataclass(frozen=True)
class SamplingOptions:
    """The options that choose how a command samples.

    Attributes:
        steps: number of steps; `None` where the command finds it elsewhere (`--steps auto`, a file of latents).
        spacing: of the timesteps; `None` for the model's own.
        timesteps: a custom list of timesteps, used instead of `steps` and `spacing`.
        eta: 0 for DDIM, 1 for DDPM.
        order: of the method, 1 to 4; `None` for the model's own.
        sigma_hat: whether noise has DDPM's larger variance.
        clipped_model_output: whether epsilon is recomputed from the clipped x_0.

    Raises:
        ValueError: for an option out of range, whatever the model.

    Example:
        >>> SamplingOptions(10, eta=1.0, order=2)
        Traceback (most recent call last):
        ValueError: order=2 requires eta=0 (deterministic sampling), got eta=1
    """

    steps: int | None
    spacing: str | None = None
    timesteps: Sequence[int] | None = None
    eta: float = 0.0
    order: int | None = None
    sigma_hat: bool = False
    clipped_model_output: bool = False

    def __post_init__(self) -> None:
        # Checked before a model is loaded.
        self._config(self.timesteps)

    @classmethod
    def parse(cls, steps: int | None, spacing: str | None, timesteps: str | None = None, **settings: Any) -> Self:
        """Collect the options of a command.

        Args:
            steps: the value of `--steps`.
            spacing: the value of `--spacing`.
            timesteps: the value of `--timesteps`: integers separated by commas.
            settings: `eta`, `order`, `sigma_hat` and `clipped_model_output`, where the command has them.

        Returns:
            The options, with the timesteps as a list.

        Raises:
            ValueError: if `timesteps` is not such a list, or an option is out of range.

        Example:
            >>> SamplingOptions.parse(50, None, "900,600,300,0").timesteps
            [900, 600, 300, 0]
        """
        return cls(steps, spacing, None if timesteps is None else parse_integers(timesteps, "--timesteps"), **settings)

    def choose_timesteps(self, pipe: ImagePipeline) -> Sequence[int] | None:
        """Return the timesteps that the options name.

        Args:
            pipe: has the scheduler whose timesteps are spaced.

        Returns:
            The custom timesteps, or those of the spacing; `None` for the model's own.
        """
        if self.timesteps is not None or self.spacing is None or self.steps is None:
            return self.timesteps
        return pipe.scheduler.make_timesteps(self.steps, self.spacing)

    def config(self, pipe: ImagePipeline) -> SamplingConfig:
        """Return the options as settings of the library.

        Args:
            pipe: as for `choose_timesteps`.

        Returns:
            The settings.

        Raises:
            ValueError: for an option out of range, or one that has no effect on the model.
        """
        if self.clipped_model_output and pipe.scheduler.clip is None:
            raise ValueError(
                "use_clipped_model_output=True requires a model whose scheduler clips the predicted x_0 "
                "(clip_sample or thresholding)"
            )
        config = self._config(self.choose_timesteps(pipe))
        # Refused here: an evaluation samples only after it has read the reference.
        config.resolve_order(pipe.scheduler.solver_order)
        return config

    def _config(self, timesteps: Sequence[int] | None) -> SamplingConfig:
        num_steps = SamplingConfig.num_inference_steps if self.steps is None else self.steps
        return SamplingConfig(num_steps, self.eta, timesteps, self.order, self.sigma_hat, self.clipped_model_output)


def load_pipeline(
    model: str, device: str, dtype: str = "float32", engine: str = "auto", takes_discrete: bool = False
) -> Any:
    """Load a pipeline and move it to its device.

    Args:
        model: a built-in model, a folder or a hub id.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        dtype: of the network: `float32`, `bfloat16` or `float16`.
        engine: how the network runs: `auto`, `eager` or `compile`.
        takes_discrete: load a discrete model (`ddim.discrete`), too, as its own pipeline.

    Returns:
        The pipeline, a `DDIMPipeline` or, where they are taken, a `DiscreteDDIMPipeline`.

    Raises:
        FileNotFoundError: if no such model exists.
        ValueError: if it is damaged, or no such device, dtype or engine exists.
    """
    from ddim.devices import choose_device, choose_dtype
    from ddim.pipeline import DDIMPipeline, DiscreteModelError

    # Checked before the weights are read, which takes long.
    target = choose_device(device), choose_dtype(dtype)
    pipe: Any
    try:
        pipe = DDIMPipeline.from_pretrained(model, engine=engine)
    except DiscreteModelError:
        if not takes_discrete:
            raise
        from ddim.discrete import DiscreteDDIMPipeline

        pipe = DiscreteDDIMPipeline.from_pretrained(model, engine=engine)
    if pipe.unet.class_embedding is not None and pipe.classes is None:
        raise ValueError(f"{model} takes other conditions than class labels, which are supported in Python alone")
    return pipe.to(*target)


def choose_model(
    argument: str | None, option: str | None, default: str | None = None, weights: str | None = None
) -> str:
    """Return the model that a user gave as an argument or as an option.

    Args:
        argument: the value of the argument.
        option: the value of `--model`.
        default: if neither is given.
        weights: the value of `--weights`.

    Returns:
        The model, with the variant of its weights.

    Raises:
        ValueError: if both are given and differ, or neither is given where one is required; as `with_weights` does.

    Example:
        >>> choose_model(None, "mnist")
        'mnist'
    """
    if argument is not None and option is not None and argument != option:
        raise ValueError(f"give one model, got {shown(argument)} and --model {shown(option)}")
    model = argument if option is None else option
    if model is None and default is None:
        raise ValueError("give a model: mnist, mnist-labels, faces, a folder, or a hub id")
    return with_weights(str(default) if model is None else model, weights)


def with_weights(model: str, weights: str | None) -> str:
    """Add the weights that a user chose to a model's name.

    Args:
        model: the name.
        weights: the value of `--weights`: `raw` for the variant that training runs and their checkpoints have, `ema`
            for the averaged weights, which have no variant; `None` for those that the name means.

    Returns:
        The name, such as `RUN@raw`.

    Raises:
        ValueError: for other weights, or if the name ends in a variant already.

    Example:
        >>> with_weights("runs/faces", "raw")
        'runs/faces@raw'
    """
    from ddim.io.runs import RAW, split_variant

    if weights is None:
        return model
    choice("weights", weights, (RAW, "ema"))
    if (variant := split_variant(model)[1]) is not None:
        raise ValueError(
            f"give the weights in the model's name or by --weights, not both, got @{variant} and {weights}"
        )
    return f"{model}@{RAW}" if weights == RAW else model


def split_model(words: Sequence[str], option: str | None, weights: str | None = None) -> tuple[str | None, list[str]]:
    """Take the model out of the arguments of a command that has others, such as images.

    Args:
        words: the arguments. One that names a model, as `ddim.io.hub.is_model` recognizes it, is the model, unless it
            is the only one.
        option: the value of `--model`.
        weights: the value of `--weights`.

    Returns:
        The model with the variant of its weights, `None` if none is given; and the other arguments.

    Raises:
        ValueError: if two are given and differ, or weights without a model; as `with_weights` does.

    Example:
        >>> split_model(["mnist", "digit.png"], None)
        ('mnist', ['digit.png'])
        >>> split_model(["mnist"], None)
        (None, ['mnist'])
    """
    from ddim.io.hub import is_model

    models = [word for word in words if is_model(word)] if len(words) > 1 else []
    others = [word for word in words if word not in models]
    if not others:
        # All are folders of models: their images are meant.
        models, others = [], list(words)
    if len(set(models)) > 1:
        raise ValueError(f"give one model, got {shown(models[0])} and {shown(models[1])}")
    if not models and option is None:
        if weights is not None:
            raise ValueError("--weights requires a model, such as --model runs/mine")
        return None, others
    return choose_model(next(iter(models), None), option, weights=weights), others


def load_latents_pipeline(
    source: str, settings: LatentSettings, model: str | None, device: str, dtype: str, engine: str
) -> DDIMPipeline:
    """Load the model that encoded latents.

    Args:
        source: the file of latents, for messages.
        settings: the settings of its latents, which name the model.
        model: the model that the user gave instead, if any.
        device: as for `load_pipeline`.
        dtype: as for `load_pipeline`.
        engine: as for `load_pipeline`.

    Returns:
        The pipeline.

    Raises:
        FileNotFoundError: if no such model exists.
        ValueError: if it is damaged, or no such device, dtype or engine exists.
    """
    try:
        return load_pipeline(settings.model if model is None else model, device, dtype, engine)
    except FileNotFoundError as error:
        if model is not None:
            raise
        raise FileNotFoundError(
            f"{source} was encoded with the model {shown(settings.model)}, which is not there ({error}); name it by "
            "--model"
        ) from None


def with_spacing(pipe: DDIMPipeline, spacing: str | None) -> DDIMPipeline:
    """Set the spacing for all numbers of steps, instead of the model's own and of learned timesteps.

    Args:
        pipe: the pipeline, which is changed.
        spacing: the value of `--spacing`; `None` changes nothing.

    Returns:
        The same pipeline.

    Raises:
        ValueError: if no such spacing exists.
    """
    if spacing is not None:
        config = pipe.scheduler.config
        pipe.scheduler = pipe.scheduler.from_config(config, timestep_spacing=spacing, **pipe.scheduler.learned_settings)
    return pipe


def read_images(paths: Sequence[str]) -> list[Image.Image | np.ndarray]:
    """Read the images of files and folders.

    Args:
        paths: files, `.npy` and `.npz` arrays among them, or folders that are searched for images.

    Returns:
        The images, in the order of the paths; those of a folder in the order of their names; arrays (H, W, C) where PIL
        has no mode for them.

    Raises:
        FileNotFoundError: if no such file exists, or no image in a folder.
        ValueError: naming the file that is not a still image.
    """
    from ddim.data.sources import open_source
    from ddim.io.array_files import read_pixels
    from ddim.io.image_files import find_images

    images: list[Image.Image | np.ndarray] = []
    for path in paths:
        if Path(path).suffix.lower() == ".npz" and Path(path).is_file():
            source = open_source(path)
            images += [decode() for decode in source.fetch(range(source.count))]
        else:
            images += [read_pixels(file) for file in (find_images(path) if Path(path).is_dir() else [path])]
    return images


def fit_images(pipe: DDIMPipeline, images: Sequence[Image.Image | np.ndarray]) -> list[Image.Image]:
    """Fit images to the model's size and mode, to be shown beside its results.

    Args:
        pipe: the model.
        images: of any size and mode that the model takes.

    Returns:
        Images of the model's size, as `show_images` shows its results.
    """
    from ddim.io.false_color import preview
    from ddim.io.images import to_output, to_samples, to_values

    samples = to_samples(list(images), *pipe.sample_shape, resize=True, pixel_format=pipe.pixel_format)
    return preview(to_values(to_output(samples, "np", pipe.pixel_format), pipe.pixel_format), pipe.pixel_format)


def show_images(pipe: DDIMPipeline, images: Any) -> list[Image.Image]:
    """Return results of a model as they are shown: in false color where they are not gray, color, or 8 bits.

    Args:
        pipe: the model.
        images: (N, H, W, C), as the model returns them for the output type `np`.

    Returns:
        N images of 8 bits.
    """
    from ddim.io.false_color import preview
    from ddim.io.images import to_values

    return preview(to_values(images, pipe.pixel_format), pipe.pixel_format)


def count_replaced(pipe: DDIMPipeline, out: str | Path, count: int) -> int:
    """Return how many earlier files `save_results` replaces, or refuse a folder that it must not write to.

    Args:
        pipe: the model.
        out: as for `save_results`.
        count: number of images to be written.

    Raises:
        FileExistsError: for a folder that `ddim.bulk` wrote, or with further images.
    """
    from ddim.io.array_files import image_suffix
    from ddim.io.image_files import replaced_files

    suffix = image_suffix(pipe.pixel_format.dtype, pipe.sample_shape[0])
    return len(replaced_files(out, count, suffix))


def save_results(
    pipe: DDIMPipeline, images: Any, out: str | Path, columns: int | None = None, scale: int | None = 1
) -> str:
    """Write results of a model into the file or folder that a user has named.

    Args:
        pipe: the model.
        images: (N, H, W, C), as the model returns them for the output type `np`.
        out: as for `ddim.io.sample_files.save_samples`.
        columns: images per row of a grid.
        scale: factor by which a grid is enlarged.

    Returns:
        A note for the command's summary; empty where the file holds the values themselves.
    """
    from ddim.io.images import to_values
    from ddim.io.sample_files import save_samples

    pixel_format = pipe.pixel_format
    keeps_values = save_samples(to_values(images, pixel_format), pixel_format, out, columns, scale)
    return "" if keeps_values else "; in false color: x.tiff, x.npz and folders hold the values"


def check_fps(fps: float) -> None:
    """Check the value of `--fps`.

    Args:
        fps: frames per second of an animation.

    Raises:
        ValueError: if it is not a number from 0.1 to 50.

    Example:
        >>> check_fps(60.0)
        Traceback (most recent call last):
        ValueError: --fps must be a number from 0.1 to 50, got 60.0
    """
    real("--fps", fps, 0.1, 50)


def count_model_files(folder: Path) -> int:
    """Count the files of a model in a folder that another one is about to replace.

    Args:
        folder: may be missing.

    Example:
        >>> count_model_files(Path("missing"))
        0
    """
    return sum((folder / name).is_file() for name in PIPELINE_FILES)


def report_result(path: Path, num_replaced: int, summary: str) -> None:
    """Print the last lines of a command that writes: the summary on stderr, the path on stdout.

    Args:
        path: where the result is.
        num_replaced: how many earlier files were replaced.
        summary: a line without its end.
    """
    note = f"; {pluralize(num_replaced, 'earlier file')} replaced" if num_replaced else ""
    print(f"{summary}{note}", file=sys.stderr)
    print(path)


def parse_integers(text: str, option: str, example: str = "900,600,300,0") -> list[int]:
    """Parse integers separated by commas.

    Args:
        text: the option's value.
        option: its name, for the message.
        example: a value that is allowed, for the message.

    Returns:
        The integers.

    Raises:
        ValueError: if an entry is not an integer.

    Example:
        >>> parse_integers("900,600,300,0", "--timesteps")
        [900, 600, 300, 0]
        >>> parse_integers("noon", "--at")
        Traceback (most recent call last):
        ValueError: --at must be integers separated by commas, such as 900,600,300,0, got 'noon'
    """
    try:
        return [int(entry) for entry in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option} must be integers separated by commas, such as {example}, got {shown(text)}"
        ) from None
