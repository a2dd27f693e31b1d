"""The tables that `ddim train` prints: the plan of a run, and what a run would cost."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ddim.validation import pluralize

if TYPE_CHECKING:
    from ddim.data.survey import ImageSurvey
    from ddim.training.costs import RunCosts
    from ddim.training.machine import Machine
    from ddim.training.plan import Plan

LIMITS = {
    "given": "",
    "images": "",
    "night": ", a night's work",
    "time": ", what fits into --max-minutes",
}
"""What a length is due to, by `Plan.limit`."""
MAX_LABELS = 40
"""Characters of what says which class an image belongs to."""


def plan_table(plan: Plan) -> str:
    """Format a plan: what was found, what was chosen and the option that overrides it, what it will cost.

    Args:
        plan: the plan.

    Returns:
        Lines of three columns.
    """
    config, costs = plan.config, plan.costs
    model, optim = config.model, config.optim
    size = model["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    visits = config.max_steps * config.batch_size
    attention = [
        f"{min(height, width) // 2**level}" for level, name in enumerate(model["down_block_types"]) if "Attn" in name
    ]
    network = f"{model['block_out_channels']}, {pluralize(model['layers_per_block'], 'block')} per level"
    if attention:
        network += f", attention at {', '.join(attention)} pixels"
    prediction = (config.scheduler.get("prediction_type", "epsilon"), "--set scheduler.prediction_type")
    if config.process == "discrete":
        prediction = (f"x_0, of {config.scheduler.get('num_values', 2)} values", "--set scheduler.num_values")
    decay = f", {optim.decay} decay over the last {optim.decay_steps:,}" if optim.decay_steps else ""
    rows = [
        ("images", describe_images(plan.survey), ""),
        *describe_labels(plan),
        ("machine", describe_machine(plan.machine), "--device"),
        *([("start", f"the weights of {config.init}", "--init")] if config.init is not None else []),
        ("size", f"{height}x{width}, {describe_channels(model['in_channels'])}", "--resolution"),
        ("network", network, "--set model.block_out_channels"),
        ("", f"{costs.parameters:,} parameters", ""),
        ("prediction", *prediction),
        ("batch", f"{config.batch_size} images, {config.precision}", "--batch-size, --precision"),
        ("learning rate", f"{optim.lr:.2g}{decay}", "--set optim.lr"),
        ("average", f"of about {round(1 / (1 - config.ema.decay)):,} steps", "--set ema.decay"),
        (
            "length",
            f"{config.max_steps:,} steps, each image {visits / costs.images:,.1f} times{LIMITS[plan.limit]}",
            "--max-steps, --epochs, --max-minutes",
        ),
        ("time", f"{describe_hours(costs.hours)}, {costs.seconds_per_step:.3g} s per step", ""),
        ("memory", f"{costs.peak_mib / 1024:,.1f} GiB", ""),
    ]
    first, second = (max(len(row[index]) for row in rows) for index in range(2))
    return "\n".join(f"{name:<{first}}  {value:<{second}}  {option}".rstrip() for name, value, option in rows)


def describe_labels(plan: Plan) -> list[tuple[str, str, str]]:
    """Return the row of the labels: those that are used, or what could be; none without labels.

    Args:
        plan: the plan.
    """
    if plan.classes is not None:
        dropout = plan.config.objective.class_dropout
        rows = [("labels", plan.classes, "--labels")]
        if dropout:
            rows.append(("", f"{dropout:.0%} of them dropped, for guidance", "--set objective.class_dropout"))
        return rows
    if plan.survey.labels is None:
        return []
    return [("", f"labels are not used: {_cut(plan.survey.labels)}", "--labels auto")]


def describe_images(survey: ImageSurvey) -> str:
    """Describe a collection of images in one line: number, sizes, pixel formats.

    Example:
        >>> from ddim.data.survey import ImageSurvey
        >>> describe_images(ImageSurvey("pics", 500, [(32, 32), (40, 64)], [("RGB", 1), ("L", 1)], 3, None))
        '500 in pics, 32x32 to 40x64, RGB and L'
        >>> describe_images(ImageSurvey("pics", 1, [(32, 32)], [("RGB", 1)], 3, None))
        '1 in pics, 32x32, RGB'
    """
    sizes = [f"{height}x{width}" for height, width in sorted(Counter(survey.sizes), key=lambda size: size[0] * size[1])]
    extent = sizes[0] if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    return f"{survey.count:,} in {survey.name}, {extent}, {' and '.join(mode for mode, _ in survey.modes)}"


def describe_machine(machine: Machine) -> str:
    """Describe a machine in one line.

    Example:
        >>> from ddim.training.machine import Machine
        >>> describe_machine(Machine("cpu", "", 2, 20 * 2**30, ()))
        'cpu, 2 cores, 20.0 GiB of memory free, no instructions for 16 bits'
    """
    name = f" ({machine.name})" if machine.name else ""
    fast = ", ".join(machine.fast_precisions)
    return (
        f"{machine.device}{name}, {pluralize(machine.cores, 'core')}, {machine.free_bytes / 2**30:,.1f} GiB of memory "
        f"free, {f'instructions for {fast}' if fast else 'no instructions for 16 bits'}"
    )


def describe_channels(channels: int) -> str:
    """Describe the channels of images.

    Example:
        >>> describe_channels(1), describe_channels(3), describe_channels(5)
        ('gray', 'color', '5 channels')
    """
    return {1: "gray", 3: "color"}.get(channels, f"{channels} channels")


def describe_hours(hours: float) -> str:
    """Describe a time in its two largest units.

    Example:
        >>> [describe_hours(hours) for hours in (0.005, 0.5, 6.8, 100)]
        ['18 s', '30 min', '6 h 48 min', '4 days 4 h']
    """
    seconds = round(hours * 3600)
    if seconds < 60:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    whole, rest = divmod(minutes, 60)
    return f"{whole} h {rest} min" if whole < 48 else f"{whole // 24} days {whole % 24} h"


def cost_table(costs: RunCosts) -> str:
    """Format the costs of a run, one line each.

    Args:
        costs: the costs.

    Returns:
        Lines of two columns.
    """
    rows = {
        "images": f"{costs.images:,}",
        "parameters": f"{costs.parameters:,}",
        "GFLOP per step": f"{costs.gflop_per_step:,.1f}",
        "weights, averages, gradients, moments": f"{costs.state_mib:,.0f} MiB",
        "memory in use": f"{costs.peak_mib:,.0f} MiB",
        "loader": f"{costs.loader_images_per_second:,.0f} images/s",
        "reading all images once": f"{costs.reading_seconds:,.0f} s",
        "time per step": f"{costs.seconds_per_step:.3f} s",
        "measured on": costs.measured,
        "time of all steps and samples": describe_hours(costs.hours),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _cut(text: str) -> str:
    """Cut a long list of names."""
    return text if len(text) <= MAX_LABELS else f"{text[:MAX_LABELS].rpartition(',')[0]}, ..."
