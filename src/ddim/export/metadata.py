"""What a file says about itself: names and values, every value JSON.

    graph              "network" or "loop"
    sample_shape       [C, H, W]
    weights_dtype      "float32", "float16" or "bfloat16"; the graph computes in float32
    prediction_type    what the network predicts: "epsilon", "sample" or "v_prediction"
    scheduler          the configuration of the model's scheduler
    classes            {"count", "names", "null"}: labels 0..count-1; null is the label of the null class, or null
    input_range        {"low", "high"} of a network's samples, [-1, 1]
    alphas_cumprod     of the network's schedule, by timestep

and for a loop, instead of the last two,

    timesteps          at which the network is evaluated, in order
    order              of the solver; null for learned coefficients
    guidance           {"scale", "negative_label"}; null for none
    output_range       {"low", "high"} of the images' values, per channel or for all
"""

from __future__ import annotations

import json
from typing import Any

from ddim.export.graphs import Graph, StepGraph
from ddim.io.config import public_entries
from ddim.io.pixel_format import PixelFormat
from ddim.sampler import Sampler
from ddim.version import __version__


def describe_graph(graph: Graph, sampler: Sampler, weights_dtype: str) -> dict[str, str]:
    """Return what is written into a file about its graph.

    Args:
        graph: of the network, or of a step of the loop.
        sampler: that the graph was made of.
        weights_dtype: of the weights in the file.

    Returns:
        Texts of JSON by name, those of this module's head.

    Example:
        >>> from ddim import DDIMPipeline
        >>> from ddim.export.graphs import NetworkGraph
        >>> sampler = DDIMPipeline.from_pretrained("mnist").sampler
        >>> describe_graph(NetworkGraph(sampler), sampler, "float32")["sample_shape"]
        '[1, 28, 28]'
    """
    scheduler, classes = sampler.scheduler, sampler.classes
    facts: dict[str, Any] = {
        "ddim_version": __version__,
        "graph": "loop" if isinstance(graph, StepGraph) else "network",
        "sample_shape": list(sampler.sample_shape),
        "weights_dtype": weights_dtype,
        "prediction_type": scheduler.config.prediction_type,
        "scheduler": public_entries(scheduler.config),
        "classes": None
        if classes is None
        else {
            "count": classes.count,
            "names": list(classes.names),
            "null": classes.count if classes.has_null else None,
        },
    }
    facts |= _describe_loop(graph, sampler.pixel_format) if isinstance(graph, StepGraph) else _describe_network(sampler)
    return {name: json.dumps(value) for name, value in facts.items()}


def _describe_network(sampler: Sampler) -> dict[str, Any]:
    return {
        "input_range": {"low": [-1.0], "high": [1.0]},
        "alphas_cumprod": sampler.scheduler.alphas_cumprod_float64.tolist(),
    }


def _describe_loop(graph: StepGraph, pixel_format: PixelFormat) -> dict[str, Any]:
    conditions, guidance = graph.conditions, None
    if conditions is not None and conditions.baseline_labels is not None:
        guidance = {"scale": conditions.guidance.scale, "negative_label": int(conditions.baseline_labels[0])}
    low, high = ([0.0], [1.0]) if pixel_format.is_eight_bit else (list(pixel_format.low), list(pixel_format.high))
    return {
        "timesteps": graph.plan.timesteps,
        "order": graph.plan.config.order,
        "guidance": guidance,
        "output_range": {"low": low, "high": high},
    }
