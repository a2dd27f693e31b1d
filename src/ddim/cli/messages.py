"""The one place where arguments of the library become options of the command line.

Exceptions of the library name arguments as Python callers know them; a user of the command line gave options:

    num_inference_steps must be an integer from 1 to 1000, got 0   ->   --steps must be an integer from 1 to 1000, got 0
    out is not empty; pass overwrite=True to replace it             ->   ... pass --overwrite to replace it

Values in quotes, paths, and messages about the contents of a file are left as they are.
"""

from __future__ import annotations

import re

IDENTIFIERS = {
    "num_inference_steps": "--steps",
    "timestep_spacing": "--spacing",
    "use_sigma_hat": "--sigma-hat",
    "use_clipped_model_output": "--use-clipped-model-output",
    "batch_size": "--batch-size",
    "shard_size": "--shard-size",
    "max_iterations": "--max-iterations",
    "max_minutes": "--max-minutes",
    "image_size": "--image-size",
    "reference_count": "--reference-count",
    "held_out": "--held-out",
    "table_steps": "--table-steps",
    "torch_dtype": "--dtype",
    "allow_paths": "--allow-paths",
    "class_labels": "--label",
    "negative_labels": "--negative-label",
    "guidance_scale": "--guidance",
    "guidance_interval": "--guidance-interval",
    "noise_std": "--noise-std",
}
"""Arguments whose names are not English words: replaced wherever they occur."""

WORDS = {
    name: f"--{name}"
    for name in (
        *("eta", "order", "timesteps", "seed", "count", "tolerance", "strength", "frames", "grid", "fps", "at"),
        *("out", "plot", "model", "weights", "reference", "data", "split", "metrics", "features", "layout", "resume"),
        *("device", "dtype", "engine", "host", "port", "guide", "method", "factor", "kernel"),
    )
} | {"seeds": "--seed"}
"""Arguments whose names are English words: replaced only as the subject of a message, as the object of an instruction,
and before `=VALUE`."""

FLAGS = {
    "overwrite=True": "--overwrite",
    "resize=True": "--resize",
    "force=True": "--force",
    "closed=True": "--closed",
    "attributes=True": "--attributes",
    "exact=True": "--exact",
    "exact=False": "--euler",
    "use_sigma_hat=True": "--sigma-hat",
    "use_clipped_model_output=True": "--use-clipped-model-output",
}
"""Arguments with values that are flags on the command line."""

BY_COMMAND: dict[str, dict[str, str]] = {
    "trajectory": {"batch_size": "--count"},
    "consistency": {"batch_size": "--count"},
    "distill": {
        "model": "MODEL",
        "source": "--data",
        "settings": "--set",
        "starts": "--starts",
        "teacher_steps": "--teacher-steps",
        "max_steps": "--max-steps",
    },
    "inpaint": {"masks": "--mask", "samples": "--count", "resampling": "--resampling"},
    "super-resolve": {"samples": "--count", "resampling": "--resampling"},
    "restore": {
        "samples": "--count",
        "resampling": "--resampling",
        "operator": "--operator",
        "factor": "the factor of --operator",
    },
    "interpolate": {"count": "the number of points"},
    "tune": {"model": "MODEL", "num_latents": "--codes", "codes": "--codes"},
    "evaluate": {"num_images": "--count", "num_samples": "--count", "samples": "SAMPLES"},
    "convert": {
        "num_heads": "--heads",
        "num_head_channels": "--head-channels",
        "heads": "--heads",
        "head_channels": "--head-channels",
        "num_train_timesteps": "--steps-trained",
        "beta_schedule": "--beta-schedule",
        "beta_start": "--beta-start",
        "beta_end": "--beta-end",
        "new_attention_order=True": "--new-attention-order",
        "use_new_attention_order=True": "--new-attention-order",
        "rescale_timesteps=True": "--rescale-timesteps",
        "rescale_timesteps=False": "--plain-timesteps",
        "use_ema=False": "--raw",
        "ema=False": "--raw",
    },
    "ema": {"sigma_rel": "--sigma-rel", "metrics": "--metric", "step": "--step", "curve": "--curve"},
    "export": {"step": "--step", "path": "--out", "loop": "--loop"},
    "train": {
        "source": "--data",
        "settings": "--set",
        "preset": "--preset",
        "repo_id": "--push-to-hub",
        "config": "--config",
        "num_inference_steps": "num_inference_steps",  # an entry of the configuration here
    },
    "info": {"model": "MODEL"},
    "app": {"model": "MODEL", "models": "MODELS"},
}
"""Arguments that one command alone has, or has under another option, by command."""

_ABOUT_ENTRIES = re.compile(r"\S+\.(json|ya?ml): |training configuration, ")
"""Such as `scheduler_config.json: beta_schedule must be ...`, which is about a key of that file, not an argument."""

_QUOTES = "'\""
_TOKEN = re.compile(
    r"""
      (?<!\w) (?: '[^']*' | "[^"]*" ) (?!\w)                                     # a value that a user gave
    | (?<![\w./=-]) (?P<name>[a-z][a-z_]*) = (?P<value> '[^']*' | "[^"]*" | [\w.+/-]*\w )
    | (?<![\w./=-]) (?P<identifier>[a-z]+(?:_[a-z]+)+) (?![\w/:-]|\.\w)
    | ^ (?P<subject>[a-z]+) (?=\ (?:must|requires)\ )
    | (?: (?<=\bgive\ ) | (?<=\bpass\ ) | (?<=\brequires\ ) ) (?P<object>(?!at\ )[a-z]+) (?![\w/:-]|\.\w)
    """,
    re.VERBOSE,
)


def to_options(message: str, command: str = "") -> str:
    """Replace the names of arguments in a message by the options of a command.

    Args:
        message: an exception's message.
        command: the command's name, such as `sample`; empty for what all commands share.

    Returns:
        The message as a user of the command line reads it.

    Example:
        >>> to_options("num_inference_steps must be an integer from 1 to 1000, got 0", "sample")
        '--steps must be an integer from 1 to 1000, got 0'
        >>> to_options("'batch_size.npz' is not empty; pass overwrite=True", "sample")
        "'batch_size.npz' is not empty; pass --overwrite"
        >>> to_options("order=2 requires eta=0, got eta=0.5", "sample")
        '--order 2 requires --eta 0, got --eta 0.5'
    """
    table = IDENTIFIERS | WORDS | FLAGS | BY_COMMAND.get(command, {})

    def option(match: re.Match[str]) -> str:
        if (name := match["name"]) is None:
            return table.get(match[0], match[0])
        if (flag := table.get(match[0])) is not None:
            return flag
        return f"{table[name]} {match['value'].strip(_QUOTES)}" if name in table else match[0]

    return message if _ABOUT_ENTRIES.match(message) else _TOKEN.sub(option, message)
