"""`Sampler`: a network and a scheduler put together and ready to run, which all that a pipeline does rests on.

It knows where the network is and in which dtype, which shape its samples have, where noise comes from, and hands the
three to the loop of `ddim.diffusion.loop`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddim.devices import choose_device
from ddim.diffusion.equations import Step
from ddim.diffusion.loop import Denoiser, State, StepSettings, in_batches, sample, walk
from ddim.diffusion.noise import NoiseSource, check_seeds, noise_from_generator, noise_from_seeds
from ddim.engine import check_engine, get_engine
from ddim.engine.base import Engine
from ddim.scheduler import DDIMScheduler
from ddim.validation import integer, real

logger = logging.getLogger(__name__)


class Sampler:
    """A network and a scheduler.

    Args:
        unet: as for `ddim.pipeline.DDIMPipeline`.
        scheduler: as there.
        engine: as there.
    """

    unet: Any
    scheduler: DDIMScheduler

    def __init__(self, unet: Any, scheduler: Any, engine: str = "auto") -> None:
        self.engine = check_engine(engine)
        for name, part in (("unet", unet), ("scheduler", scheduler)):
            if not hasattr(part, "config"):
                raise TypeError(
                    f"the {name} is a {type(part).__name__}, which has no .config to read its settings from"
                )
        self._progress_bar_config: dict[str, Any] = {}
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def components(self) -> dict[str, Any]:
        """`{"unet": ..., "scheduler": ...}`: another pipeline can be built from them without copying weights."""
        return {"unet": self.unet, "scheduler": self.scheduler}

    def register_modules(self, **modules: Any) -> None:
        """Replace the `unet`, the `scheduler` or both; TypeError for other names."""
        for name, module in modules.items():
            if name == "unet":
                self.unet = module
            elif name == "scheduler":
                self.scheduler = DDIMScheduler.from_config(module.config)
            else:
                raise TypeError(f"a DDIMPipeline has no component {name!r}; it has unet and scheduler")

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return torch.device(getattr(self.unet, "device", "cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's parameters."""
        dtype = getattr(self.unet, "dtype", torch.float32)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    def to(
        self, *args: str | torch.device | torch.dtype, device: str | torch.device | None = None, dtype: Any = None
    ) -> Self:
        """Move the network: `pipe.to("cuda")`, `pipe.to(torch.bfloat16)`, `pipe.to("cuda", torch.bfloat16)`.

        Args:
            args: a device, a floating dtype, or both, in any order.
            device: the same by name.
            dtype: the same by name.

        Raises:
            ValueError: if there is no such device here.
            TypeError: for anything else than a device and a floating dtype.
        """
        for arg in args:
            if isinstance(arg, torch.dtype):
                dtype = arg
            else:
                device = arg
        if not isinstance(device, str | torch.device | None):
            raise TypeError(
                f"cannot move to {device!r}; give a device such as 'cpu' or 'cuda:0', a floating dtype, or both"
            )
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"cannot move to {dtype!r}; give a floating dtype such as torch.bfloat16")
        self.unet.to(device=None if device is None else choose_device(device), dtype=dtype)
        return self

    def set_progress_bar_config(self, **config: Any) -> None:
        """Arguments for the `tqdm` bar, such as `disable=True` or `desc="sampling"`."""
        self._progress_bar_config = config

    @property
    def _sample_dtype(self) -> torch.dtype:
        """Samples are kept in float32 at least: in half precision the small late steps would drown in rounding."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the network's samples."""
        config = self.unet.config
        size = config.sample_size
        if size is None:
            raise ValueError("the model's configuration has no sample_size, so that noise has no shape; give latents")
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> tqdm[Any]:
        """A `tqdm` bar with the settings of `set_progress_bar_config`."""
        return tqdm(iterable, **({"total": total} | self._progress_bar_config))

    def _plan(
        self,
        num_inference_steps: int,
        timesteps: Sequence[int] | None,
        eta: float,
        use_sigma_hat: bool,
        order: int | None = None,
    ) -> list[Step]:
        """All steps' coefficients; the scheduler's own timesteps are set to match. An order of `None` is the
        scheduler's.
        """
        real("eta", eta)
        if use_sigma_hat and eta != 1:
            raise ValueError(f"use_sigma_hat is DDPM's larger variance and wants eta=1, not {eta}")
        scheduler = self.scheduler
        order = scheduler.config.solver_order if order is None else order
        chosen = scheduler.make_timesteps(num_inference_steps, order=order) if timesteps is None else timesteps
        steps = scheduler.make_steps(chosen, eta, use_sigma_hat, order)
        if eta > 1:
            logger.warning(
                "eta is %s; above 1 the process adds more noise than DDPM and its marginals are no longer those of "
                "training",
                eta,
            )
        scheduler.set_timesteps(timesteps=[step.timestep for step in steps])
        return steps

    def _noise(
        self,
        batch_size: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        seeds: Iterable[int] | None,
        latents: Tensor | None,
    ) -> tuple[int, NoiseSource]:
        """The checked batch size, and where noise of its shape comes from."""
        batch_size = integer("batch_size", batch_size, 1)
        if generator is not None and seeds is not None:
            raise ValueError("give either seeds or generator, not both")
        seeds = None if seeds is None else list(seeds)
        if batch_size == 1:
            batch_size = len(seeds or ()) or (len(latents) if isinstance(latents, Tensor) and latents.ndim else 1) or 1
        shape = (batch_size, *(latents.shape[1:] if isinstance(latents, Tensor) else self.sample_shape))
        if seeds is not None:
            return batch_size, noise_from_seeds(shape, check_seeds(seeds, batch_size), self.device)
        return batch_size, noise_from_generator(shape, generator, self.device, self.dtype)

    def _check_latents(self, latents: Tensor, batch_size: int) -> Tensor:
        """Latents on the model's device, in the samples' dtype or float64."""
        if not isinstance(latents, Tensor):
            raise TypeError(f"latents is a {type(latents).__name__}; it must be a tensor (N, C, H, W)")
        sized = self.unet.config.sample_size is not None
        C, *size = self.sample_shape if sized else (self.unet.config.in_channels, *latents.shape[2:])
        wanted = (max(1, batch_size), C, *size)
        if tuple(latents.shape) != wanted or len(wanted) != 4:
            raise ValueError(f"latents has shape {tuple(latents.shape)}; the model and batch_size want {wanted}")
        if not latents.is_floating_point() or not bool(torch.isfinite(latents).all()):
            raise ValueError("latents must be finite floating-point numbers; it holds NaN, infinity or integers")
        return latents.to(self.device, torch.promote_types(latents.dtype, self._sample_dtype))

    def _network(self) -> Engine:
        """What runs the network."""
        return get_engine(self.unet, self.engine)

    def _denoiser(self, steps: Sequence[Step], batch_size: int | None = None, engine: Engine | None = None) -> Denoiser:
        """The network as the loop of those steps calls it, run by the engine; with a `batch_size`, asked about exactly
        so many samples at a time.
        """
        dtype = self.dtype
        engine = self._network() if engine is None else engine
        engine.prepare([step.timestep for step in steps])

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            return engine.predict(x.to(dtype), t).to(x.dtype)

        return denoiser if batch_size is None else in_batches(denoiser, batch_size)

    def _sample(
        self,
        latents: Tensor,
        steps: Sequence[Step],
        use_clipped_model_output: bool = False,
        noise: NoiseSource | None = None,
    ) -> Iterator[State]:
        """The loop with this network and the scheduler's settings."""
        scheduler, engine = self.scheduler, self._network()
        settings = StepSettings(scheduler.config.prediction_type, scheduler.clip, use_clipped_model_output, noise)
        step_fn = engine.step_fn(latents, steps, settings)
        if step_fn is not None:
            return walk(latents, steps, step_fn)
        return sample(self._denoiser(steps, engine=engine), latents, steps, settings)

    @contextmanager
    def _running(self, total: int) -> Iterator[tqdm[Any]]:
        """What the loop runs in: a progress bar of `total` steps, no gradients, evaluation mode."""
        with self.progress_bar(total=total) as bar, torch.no_grad(), evaluating(self.unet):
            yield bar


@contextmanager
def evaluating(network: Any) -> Iterator[None]:
    """Evaluation mode inside, and for each part of the network the mode it was in afterwards."""
    training = [module for module in network.modules() if module.training] if isinstance(network, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
