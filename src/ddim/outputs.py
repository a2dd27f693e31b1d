"""Results with names: dataclasses that are dictionaries, can be indexed as tuples, and are containers to PyTorch.

The classes and their behavior are those of `diffusers.utils.BaseOutput`: code that casts, gathers, maps over or exports
results (accelerate, `DataParallel`, `torch.utils._pytree`, `torch.export`) handles both alike.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch.utils import _pytree as pytree

from ddim.validation import list_unknown

if TYPE_CHECKING:
    import torch


class Output(OrderedDict[str, Any]):
    """Base of results, whose fields are reached as `out.name`, `out["name"]` and `out[0]`.

    As a dictionary and as a tuple a result holds the fields that are not `None`. Iterating over it gives names;
    `to_tuple()` can be unpacked. Entries cannot be removed. A subclass is a dataclass; it can also be built from a
    mapping, or an iterator of pairs, of its fields, as PyTorch's containers rebuild dictionaries.

    Raises:
        TypeError: when an entry is removed.

    Example:
        >>> out = ImagePipelineOutput(images=["an image"])
        >>> out.images is out["images"] is out[0]
        True
        >>> ImagePipelineOutput({"images": []}).to_tuple()
        ([],)
    """

    def __init_subclass__(cls) -> None:
        pytree.register_pytree_node(
            cls,
            lambda out: (list(out.values()), list(out)),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
            flatten_with_keys_fn=lambda out: ([(pytree.MappingKey(k), v) for k, v in out.items()], list(out)),
        )

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        first, *others = (getattr(self, name) for name in names)
        if isinstance(first, Mapping | Iterator) and all(other is None for other in others):
            entries = dict(first)
            if unknown := entries.keys() - set(names):
                raise TypeError(f"{type(self).__name__} has no field {list_unknown(sorted(unknown), names)}")
            object.__setattr__(self, names[0], None)
        else:
            entries = {name: getattr(self, name) for name in names}
        for name, value in entries.items():
            if value is not None:
                self[name] = value

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not `None`."""
        return tuple(self.values())

    # Not super(): the class of `diffusers` may have become a base.
    def __getitem__(self, key: int | slice | str) -> Any:
        return OrderedDict.__getitem__(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        OrderedDict.__setitem__(self, key, value)
        object.__setattr__(self, key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        # Fields become entries in `__post_init__`: until then it is open whether the first one is a mapping of all.
        if value is not None and name in self:
            OrderedDict.__setitem__(self, name, value)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"the fields of {type(self).__name__} cannot be removed or added")

    __delitem__ = pop = popitem = clear = update = setdefault = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]


@dataclass
class UNet2DOutput(Output):
    """The prediction of a U-Net.

    Attributes:
        sample: (N, out_channels, H, W), in the network's dtype.

    Example:
        >>> import torch
        >>> UNet2DOutput(torch.zeros(2, 3, 8, 8)).sample.shape
        torch.Size([2, 3, 8, 8])
    """

    sample: torch.Tensor


@dataclass
class DDIMSchedulerOutput(Output):
    """The result of a sampling step.

    Attributes:
        prev_sample: x at the next timestep of the subsequence, (N, C, H, W).
        pred_original_sample: the predicted x_0 after clipping, (N, C, H, W).

    Example:
        >>> import torch
        >>> len(DDIMSchedulerOutput(torch.zeros(1, 1, 8, 8)).to_tuple())
        1
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


@dataclass
class ImagePipelineOutput(Output):
    """Sampled images.

    Attributes:
        images: a list of N PIL images; a float32 array (N, H, W, C) in [0, 1], or a tensor (N, C, H, W) in [0, 1]; of a
            model of 16-bit or float images both are in the data's units.

    Example:
        >>> ImagePipelineOutput(images=[])[0]
        []
    """

    images: Any


@dataclass
class EncodeOutput(Output):
    """The latents of N images, and the errors and the cost of their encoding.

    Attributes:
        latents: float32 (N, C, H, W) on the model's device: x at `timesteps[0]`. Float64 images, a float64 model
            and `method="pair"` give float64 latents.
        timesteps: the S timesteps, strictly decreasing; `decode` requires the same.
        residuals: (N, S): the largest difference, among the values of an image in [-1, 1], between the result of a
            decoding step and the sample that the encoding step started from. Column j belongs to the step from
            `timesteps[j]`; a step from timestep 0 to its own alpha has no residual and no cost. All are 0 of
            `method="pair"`, which solves no equations.
        evaluations: int64 (N, S): function evaluations (NFE) of each step.
        tolerance: the residual required of each step.
        mse: float64 (N,): the mean squared error per value in [0, 1] of the decoded images, before clipping and
            rounding; NaN if it was not computed (`verify=False`).
        second_latents: of `method="pair"`: x at `timesteps[1]`, of the shape of `latents`, from which together with
            these `decode` starts; `None` otherwise.

    Example:
        >>> import torch
        >>> residuals, nfe = torch.tensor([[0.0, 3e-6], [0.0, 1e-3]]), torch.tensor([[4, 5], [4, 50]])
        >>> out = EncodeOutput(torch.zeros(2, 1, 8, 8), [500, 0], residuals, nfe, 1e-5, torch.zeros(2))
        >>> out.converged.tolist()
        [True, False]
    """

    latents: torch.Tensor
    timesteps: list[int]
    residuals: torch.Tensor
    evaluations: torch.Tensor
    tolerance: float
    mse: torch.Tensor
    second_latents: torch.Tensor | None = None

    @property
    def residual(self) -> torch.Tensor:
        """The largest residual of each image, (N,)."""
        return self.residuals.amax(1)

    @property
    def converged(self) -> torch.Tensor:
        """Whether every step of each image reached the tolerance, bool (N,)."""
        return self.residual <= self.tolerance


@dataclass
class ReconstructOutput(Output):
    """Images that were encoded and decoded again.

    Attributes:
        images: the decoded images: a list of N PIL images, an array (N, H, W, C) or a tensor (N, C, H, W) in [0, 1].
        codes: the output of the encoding.

    Example:
        >>> import torch
        >>> codes = EncodeOutput(torch.zeros(1, 1, 8, 8), [0], torch.zeros(1, 1), torch.zeros(1, 1), 1e-5,
        ...                      torch.tensor([1e-4]))
        >>> ReconstructOutput([], codes).psnr.tolist()
        [40.0]
    """

    images: Any
    codes: EncodeOutput

    @property
    def mse(self) -> torch.Tensor:
        """The mean squared error per value in [0, 1] of each image, float64 (N,)."""
        return self.codes.mse

    @property
    def psnr(self) -> torch.Tensor:
        """The peak signal-to-noise ratio of each image in dB, (N,): -10 log10(mse)."""
        return -10 * self.mse.log10()


@dataclass
class TrajectoryOutput(Output):
    """Samples on their way from noise to images.

    Each list has one entry per recorded timestep, the noisiest first; an entry holds N images of the requested
    `output_type`.

    Attributes:
        timesteps: t of each entry.
        samples: x_t of each entry.
        pred_original_samples: the x_0 that the network predicts from x_t.
        images: the final images.

    Example:
        >>> TrajectoryOutput([900, 0], ["x_900", "x_0"], ["x_0 from x_900", "x_0 from x_0"], "images").timesteps
        [900, 0]
    """

    timesteps: list[int]
    samples: list[Any]
    pred_original_samples: list[Any]
    images: Any


@dataclass
class RestoreOutput(Output):
    """Images sampled from measurements.

    Attributes:
        images: N times `samples` images, those of a measurement one after the other: a list of PIL images, an array
            (N, H, W, C) or a tensor (N, C, H, W) in [0, 1].
        mean: the mean of the samples of each measurement, of the same kind.
        std: the standard deviation of the samples of each measurement, per value in [0, 1], (N, C, H, W); zero for one
            sample.
        nfe: function evaluations per image.

    Example:
        >>> import torch
        >>> RestoreOutput([], [], torch.zeros(1, 1, 8, 8), 50).nfe
        50
    """

    images: Any
    mean: Any
    std: torch.Tensor
    nfe: int
