"""Conditions of the samples of a run, and guidance: predictions pushed away from those of a weaker model.

    prediction(x, t) = D_0(x, t) + w (D_1(x, t) - D_0(x, t))

D_1 is the network, given a sample's class. D_0 is one of

    the same network, given the null class that it was trained with      classifier-free guidance
    the same network, given another class                                a negative label
    a smaller or less trained network, given the same class              autoguidance

w = 1 is D_1 alone and w = 0 is D_0 alone; w > 1 goes beyond D_1, away from what D_0 does worse. At one x_t epsilon,
x_0 and v are affine functions of each other, with the same coefficients for D_0 and D_1, and so it does not matter
which of them the networks predict. With an interval (low, high) guidance acts at timesteps from low to high alone, and
w = 1 elsewhere: at much noise it takes diversity, at little it does nothing.

D_0 and D_1 of one network are evaluated as one batch of twice the size.

References:
    Classifier-free guidance: arXiv 2207.12598. Intervals: arXiv 2404.07724. Autoguidance: arXiv 2406.02507.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self, cast

import torch
from torch import Tensor

from ddim.diffusion.loop import Denoiser, divide_batches
from ddim.validation import integer, real, shown

Predictor = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Takes x_t (N, C, H, W), t as a tensor () and the class labels (N,), or embeddings (N, D), or `None` where there are
none; returns the prediction (N, C, H, W)."""


class Guide(Protocol):
    """A weaker model, as `Conditions` hold it: a `ddim.sampler.Sampler`."""

    @property
    def is_batch_invariant(self) -> bool:
        """Whether its engine is (`ddim.engine.base.Engine`)."""

    def predictor(self, timesteps: Sequence[int], classes: Tensor | None) -> Predictor:
        """Return its network, prepared for a run.

        Args:
            timesteps: of the run.
            classes: distinct class labels of the run, int64 (L,); `None` for a network without classes.
        """


@dataclass(frozen=True)
class Guidance:
    """How far predictions are pushed away from those of the weaker model, and when.

    Attributes:
        scale: w, at least 0; 1 for none.
        interval: the smallest and the largest timestep at which guidance acts; `None` for all.

    Raises:
        ValueError: if the scale is negative or not finite, or the interval is not two timesteps in ascending order.
        TypeError: if the scale is not a number.

    Example:
        >>> guidance = Guidance(2.0, (100, 800))
        >>> guidance.scale_at(50), guidance.scale_at(800)
        (1.0, 2.0)
        >>> Guidance(-1)
        Traceback (most recent call last):
        ValueError: guidance_scale must be a number of at least 0, got -1
    """

    scale: float = 1.0
    interval: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", real("guidance_scale", self.scale, minimum=0))
        if self.interval is None:
            return
        if not isinstance(self.interval, tuple | list) or len(self.interval) != 2:
            raise ValueError(f"guidance_interval must be two timesteps, (low, high), got {shown(self.interval)}")
        low, high = (integer("each of guidance_interval", bound, 0) for bound in self.interval)
        if low > high:
            raise ValueError(f"guidance_interval must be (low, high) in ascending order, got ({low}, {high})")
        object.__setattr__(self, "interval", (low, high))

    @property
    def is_active(self) -> bool:
        """Whether the weaker model is evaluated at all."""
        return self.scale != 1

    def scale_at(self, timestep: int) -> float:
        """Return w at a timestep.

        Args:
            timestep: in 0..T-1.
        """
        if self.interval is not None and not self.interval[0] <= timestep <= self.interval[1]:
            return 1.0
        return self.scale


@dataclass(frozen=True)
class Conditions:
    """What the samples of a run are conditioned on, sample by sample, or all of them alike.

    Attributes:
        labels: of D_1: class labels, int64 (N,), or embeddings of classes, floating (N, D); a single one is that of all
            samples; `None` for a network without classes.
        baseline_labels: of D_0, of the same kind; `None` without guidance, and where the guide is D_0.
        guidance: its scale and interval.
        guide: the model of D_0 where it is another one; `None` for the same network.

    Example:
        >>> conditions = Conditions(torch.tensor([3, 8]), torch.tensor([10, 10]), Guidance(2.0))
        >>> conditions.take(torch.tensor([1])).labels
        tensor([8])
    """

    labels: Tensor | None
    baseline_labels: Tensor | None = None
    guidance: Guidance = Guidance()
    guide: Guide | None = None

    def take(self, rows: Tensor | slice) -> Self:
        """Return the conditions of some samples.

        Args:
            rows: their indices, int64 (n,), or a slice.
        """
        given = self.labels, self.baseline_labels
        labels, baseline = (t if t is None or len(t) == 1 else t[rows] for t in given)
        return replace(self, labels=labels, baseline_labels=baseline)

    def classes(self) -> Tensor | None:
        """Return the distinct class labels of D_1, and of D_0 where the same network is D_0; `None` for embeddings."""
        used = [t for t in (self.labels, self.baseline_labels) if t is not None]
        if not used or any(t.is_floating_point() for t in used):
            return None
        return cast(Tensor, torch.unique(torch.cat(used)))


def predict_guided(
    predict: Predictor, x: Tensor, t: Tensor, conditions: Conditions, guide: Predictor | None = None
) -> Tensor:
    """Evaluate a network with guidance.

    Args:
        predict: the network.
        x: x_t, (N, C, H, W).
        t: the timestep, a tensor (); without an interval also one per sample, (N,).
        conditions: of these N samples.
        guide: the network of the conditions' guide, if they have one.

    Returns:
        The guided prediction, (N, C, H, W).

    Example:
        >>> predict = lambda x, t, labels: labels.view(-1, 1, 1, 1).expand_as(x).float()
        >>> conditions = Conditions(torch.tensor([3]), torch.tensor([1]), Guidance(2.0))
        >>> predict_guided(predict, torch.zeros(1, 1, 1, 1), torch.tensor(5), conditions).item()
        5.0
    """
    guidance = conditions.guidance
    given = conditions.labels, conditions.baseline_labels
    N = x.shape[0]  # not len(x), which fixes the batch size of a graph that is exported
    labels, baseline_labels = (t if t is None else t.expand(N, *t.shape[1:]) for t in given)
    # The timestep itself is needed for an interval alone: reading it waits for the device.
    scale = guidance.scale if guidance.interval is None else guidance.scale_at(int(t))
    if scale == 1:
        return predict(x, t, labels)
    if guide is not None:
        baseline = guide(x, t, labels)
        return baseline if scale == 0 else torch.lerp(baseline, predict(x, t, labels), scale)
    if scale == 0:
        return predict(x, t, baseline_labels)
    assert labels is not None
    assert baseline_labels is not None
    both = predict(torch.cat([x, x]), torch.cat([t, t]) if t.ndim else t, torch.cat([labels, baseline_labels]))
    return torch.lerp(both[N:], both[:N], scale)


class ConditionalDenoiser:
    """A denoiser whose samples have conditions of their own, sample i of the run those of row i.

    Args:
        predict: the network.
        conditions: of all samples of the run.
        batch_size: evaluate so many samples at a time; `None` for all at once.
        guide: the network of the conditions' guide, if they have one.
        fill: fill up the last batch with the last sample.

    Example:
        >>> predict = lambda x, t, labels: labels.view(-1, 1, 1, 1).expand_as(x)
        >>> denoiser = ConditionalDenoiser(predict, Conditions(torch.tensor([3, 8])))
        >>> denoiser.take(torch.tensor([1]))(torch.zeros(1, 1, 1, 1), torch.tensor(5)).item()
        8
    """

    def __init__(
        self,
        predict: Predictor,
        conditions: Conditions,
        batch_size: int | None = None,
        guide: Predictor | None = None,
        fill: bool = True,
    ) -> None:
        self.predict, self.conditions = predict, conditions
        self.batch_size, self.guide, self.fill = batch_size, guide, fill

    def take(self, rows: Tensor | slice) -> ConditionalDenoiser:
        """Return the denoiser of some samples of the run.

        Args:
            rows: their indices, int64 (n,), or a slice.
        """
        return ConditionalDenoiser(self.predict, self.conditions.take(rows), self.batch_size, self.guide, self.fill)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the guided prediction.

        Args:
            x: x_t of all samples that the conditions are of, (N, C, H, W).
            t: the timestep, an int64 tensor ().
        """
        if self.batch_size is None:
            return predict_guided(self.predict, x, t, self.conditions, self.guide)
        outputs = [
            predict_guided(self.predict, x[rows], t, self.conditions.take(rows), self.guide)
            for rows in divide_batches(x, self.batch_size, self.fill)
        ]
        return torch.cat(outputs)[: len(x)]


def take_rows(denoiser: Denoiser, rows: Tensor | slice) -> Denoiser:
    """Return the denoiser of some samples of a run, with their conditions where samples have conditions.

    Args:
        denoiser: of all samples.
        rows: the indices of the samples, int64 (n,), or a slice.

    Example:
        >>> take_rows(torch.mul, torch.tensor([0])) is torch.mul
        True
    """
    return denoiser.take(rows) if isinstance(denoiser, ConditionalDenoiser) else denoiser
