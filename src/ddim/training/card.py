"""The model card of a run's result: the network, the data, the training and its metrics, from the run's records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ddim.io.class_labels import MAX_NAMES_SHOWN, ClassLabels, grid_of_classes
from ddim.io.false_color import shows_values
from ddim.io.images import height_and_width
from ddim.io.pixel_format import PixelFormat
from ddim.training.config import DistillConfig
from ddim.training.history import format_history
from ddim.training.processes import PROCESSES
from ddim.training.trainer import Trainer

CARD = """---
library_name: ddim
{tag}tags:
  - diffusers
  - ddim
---

# {name}

A denoising diffusion model of {kind}, trained with `ddim`.

![{count} samples, {steps} steps](samples.png)

{count} samples from seeds 0 to {last} at {steps} steps, none picked{shown}.

```python
from {module} import {pipeline}{origin}{units}

pipe = {pipeline}.from_pretrained("{name}")  # this folder, or its id on the hub
images = pipe(batch_size=16, num_inference_steps={steps}{output}).images
```

| | |
|---|---|
{facts}

![loss](loss.png)

The losses of training, by quarter of the timesteps.

## Settings

```yaml
{settings}```
"""


def model_card(trainer: Trainer, out: Path, record: dict[str, Any]) -> str:
    """Write the model card of a run.

    Args:
        trainer: the run, at its end.
        out: folder of the run; its name becomes the model's.
        record: content of the run's `config.yaml`.

    Returns:
        Markdown with a YAML header, as the hub reads it.
    """
    config, scheduler, pixel_format = trainer.config, trainer.scheduler, trainer.dataset.pixel_format
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line][-10:]
    evaluations = [line for line in lines if "held_out_loss" in line or "frechet_distance" in line][-1:]
    images, processes = len(trainer.batches.indices), trainer.accelerator.num_processes
    passes = trainer.step * config.batch_size / images
    held_out = f", {len(trainer.held_out):,} more held out" if len(trainer.held_out) else ""
    facts = {
        "network": f"`UNet2DModel`, {trainer.model.num_parameters():,} parameters",
        "predicts": f"{_describe_prediction(scheduler)}; {scheduler.config.beta_schedule} betas, T = {len(scheduler)}",
        "weights": f"exponential moving average, decay {config.ema.decay}"
        if config.ema.sigma_rel is None
        else f"power-function average, sigma_rel {config.ema.sigma_rel:g}",
        **_describe_teacher(config.distill),
        "data": f"{config.data.source}: {images:,} images{held_out}, SHA-256 {record['data']['sha256'][:16]}",
        "length": f"{trainer.step:,} steps of {config.batch_size} images, {passes:.1f} passes over the data",
        "time": f"{trainer.seconds / 60:.1f} minutes on {record['device']}; processes: {processes}",
        "objective": f"{config.objective.weighting} weighting, {config.precision}",
    }
    count, of_class = config.samples.count, ""
    if trainer.classes is not None:
        rows, columns = grid_of_classes(count, trainer.classes.count)
        count, of_class = rows * columns, ", a row per class"
        facts["classes"] = _describe_classes(trainer.classes, config.objective.class_dropout)
    if not pixel_format.is_eight_bit:
        pairs = zip(pixel_format.low, pixel_format.high, strict=True)
        facts["values"] = f"{pixel_format.dtype}, from " + ", ".join(f"{low:g} to {high:g}" for low, high in pairs)
    if "history" in record:
        facts["history"] = format_history(record["history"])
    if losses:
        facts["final loss"] = f"{sum(losses) / len(losses):.4f}, mean over the last {len(losses)} lines of the metrics"
    for line in evaluations:
        step = line.pop("step")
        facts |= {key.replace("_", " "): f"{value:.4g}, at step {step:,}" for key, value in line.items()}
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    model, is_gaussian = config.model, config.process == "gaussian"
    channels = model.get("in_channels", 3)
    return CARD.format(
        name=out.resolve().name,
        kind=_describe_images(height_and_width(model["sample_size"]), channels, pixel_format),
        units="" if pixel_format.is_eight_bit or trainer.classes is not None else ", whose images are in [0, 1]",
        module="ddim" if is_gaussian else "ddim.discrete",
        pipeline=PROCESSES[config.process].pipeline.__name__,
        tag="" if trainer.classes is not None else "pipeline_tag: unconditional-image-generation\n",
        origin="" if trainer.classes is not None or not is_gaussian else "  # or: from diffusers import DDIMPipeline",
        output=(f", class_labels={_an_example(trainer.classes)}" if trainer.classes is not None else "")
        + ("" if pixel_format.is_eight_bit and pixel_format.fits_pil(channels) else ', output_type="np"'),
        shown=of_class + ("" if shows_values(channels, pixel_format) else ", in false color"),
        count=count,
        last=count - 1,
        steps=config.samples.num_inference_steps,
        facts="\n".join(f"| {name} | {fact} |" for name, fact in facts.items()),
        settings=yaml.safe_dump(record["config"], allow_unicode=True, sort_keys=False),
    )


def _describe_prediction(scheduler: Any) -> str:
    """Return what the network predicts."""
    num_values = scheduler.config.get("num_values")
    return f"x_0 of {num_values} values" if num_values is not None else str(scheduler.config.prediction_type)


def _describe_teacher(config: DistillConfig) -> dict[str, str]:
    """Return what the steps of a student are, and where they come from."""
    if config.teacher is None:
        return {}
    S = len(config.starts)
    guidance = "" if config.guidance_scale == 1 else f" with guidance {config.guidance_scale:g}"
    return {
        "steps": f"{S}, and no other number",
        "teacher's timesteps": ", ".join(map(str, config.starts)),
        "distilled from": f"{S * config.substeps} steps of order {config.order} of `{config.teacher}`{guidance}",
    }


def _describe_classes(classes: ClassLabels, class_dropout: float) -> str:
    """Return how many classes there are, their names, and the null class."""
    names = ", ".join(classes.names[:MAX_NAMES_SHOWN]) + ", ..." * (classes.count > MAX_NAMES_SHOWN)
    null = f"; {class_dropout:.0%} of the labels dropped, for guidance" if classes.has_null else "; no null class"
    return f"{classes.count}: {names}{null}"


def _an_example(classes: ClassLabels) -> str:
    """Return a class as Python code: its name, or its number where that is the name."""
    return "0" if classes.names[0] == "0" else repr(classes.names[0])


def _describe_images(size: tuple[int, int], channels: int, pixel_format: PixelFormat) -> str:
    """Return what the images are, such as "28x28 gray images"."""
    height, width = size
    names = {1: "gray", 2: "gray images with alpha", 3: "color", 4: "color images with alpha"}
    if not pixel_format.is_eight_bit or channels not in names:
        return f"{height}x{width} images, {pixel_format.describe(channels)}"
    name = names[channels]
    return f"{height}x{width} {name}" if "images" in name else f"{height}x{width} {name} images"
