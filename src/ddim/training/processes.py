"""The two diffusion processes that models are trained for: what a run takes of each.

gaussian    sections 3 and 4 of arXiv 2010.02502: a `DDIMScheduler`, a network of the images' channels
discrete    its appendix A: a `DiscreteDDIMScheduler`, a network of K channels for each of the images' channels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ddim.discrete import DiscreteDDIMPipeline, DiscreteDDIMScheduler
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler


@dataclass(frozen=True)
class Process:
    """The classes of a process.

    Attributes:
        scheduler: whose arguments are the section `scheduler` of a configuration.
        pipeline: that a run results in.
        scheduler_defaults: where a trained model's scheduler differs from one without arguments.
        weightings: values of `objective.weighting`.

    Example:
        >>> PROCESSES["discrete"].pipeline.__name__
        'DiscreteDDIMPipeline'
    """

    scheduler: type[Any]
    pipeline: type[Any]
    scheduler_defaults: Mapping[str, Any]
    weightings: tuple[str, ...]


PROCESSES: Mapping[str, Process] = {
    # Without clipping more sampling steps converge to a limit.
    "gaussian": Process(DDIMScheduler, DDIMPipeline, {"clip_sample": False}, ("simple", "min_snr", "truncated_snr")),
    "discrete": Process(DiscreteDDIMScheduler, DiscreteDDIMPipeline, {}, ("simple", "kl")),
}
"""The processes by their names in configurations."""


def channel_arguments(scheduler: Any, model: Mapping[str, Any]) -> dict[str, int]:
    """Return the channels of a network, where the process gives it others than the images have.

    Args:
        scheduler: of either process.
        model: arguments of `UNet2DModel`, with the images' channels.

    Returns:
        Arguments of `UNet2DModel` that replace those.

    Example:
        >>> channel_arguments(DiscreteDDIMScheduler(num_values=4), {"in_channels": 3})
        {'in_channels': 12, 'out_channels': 12}
        >>> channel_arguments(DDIMScheduler(), {"in_channels": 3})
        {}
    """
    if not isinstance(scheduler, DiscreteDDIMScheduler):
        return {}
    channels = model.get("in_channels", 3) * scheduler.num_values
    return {"in_channels": channels, "out_channels": channels}
