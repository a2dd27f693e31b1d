"""The history of a run: entries of its configuration that changed when it resumed, and from which step on.

In `RUN/config.yaml`, below the configuration that holds now, from the earliest change to the latest:

    history:
    - step: 900
      changes:
        max_steps: [900, 1800]

Steps 1 to 900 were taken with `max_steps: 900`, later ones with `max_steps: 1800`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ddim.training.config import TrainConfig, changed_entries
from ddim.training.optim import learning_rate


def extend_history(
    history: Sequence[Mapping[str, Any]], old: TrainConfig, new: TrainConfig, step: int
) -> list[dict[str, Any]]:
    """Add the entries that change when a run resumes.

    Changes from this step on, or from later ones, which are taken anew, are merged with them.

    Args:
        history: the history so far.
        old: the configuration of the run.
        new: the configuration it resumes with.
        step: the step resumed from; a run that starts has an empty history.

    Returns:
        The new history.

    Example:
        >>> from ddim.training.config import load_config
        >>> old, new = (load_config("digits", overrides={"max_steps": steps}) for steps in (900, 1800))
        >>> extend_history([], old, new, 900)
        [{'step': 900, 'changes': {'max_steps': [900, 1800]}}]
        >>> extend_history(extend_history([], old, new, 900), new, old, 900)
        []
    """
    changes = {key: list(values) for key, values in changed_entries(old, new).items()}
    for entry in reversed(history):
        if entry["step"] >= step:
            for key, (before, after) in entry["changes"].items():
                changes[key] = [before, changes[key][1] if key in changes else after]
    changes = {key: values for key, values in changes.items() if values[0] != values[1]}
    earlier = [dict(entry) for entry in history if entry["step"] < step]
    return [*earlier, {"step": step, "changes": changes}] if changes and step else earlier


def describe_changes(old: TrainConfig, new: TrainConfig, step: int) -> list[str]:
    """Say what changes when a run resumes, and what follows for its learning rate.

    Args:
        old: the configuration of the run.
        new: the configuration it resumes with.
        step: the step resumed from.

    Returns:
        A sentence per entry, without a full stop, and one about the learning rate where it decays.

    Example:
        >>> from ddim.training.config import load_config
        >>> old, new = (load_config("digits", overrides={"optim.lr": lr}) for lr in (0.002, 0.001))
        >>> describe_changes(old, new, 300)[0]
        'optim.lr is 0.001 from step 300 on; it was 0.002'
    """
    changes = changed_entries(old, new)
    lines = [f"{key} is {after} from step {step} on; it was {before}" for key, (before, after) in changes.items()]
    if new.optim.decay != "constant" and any(key == "max_steps" or key.startswith("optim.") for key in changes):
        rates = [learning_rate(config.optim, min(step, config.max_steps), config.max_steps) for config in (old, new)]
        lines.append(
            f"the learning rate is that of a run of {new.max_steps} steps from its start: {rates[1]:.3g} in the next "
            f"step (before: {rates[0]:.3g}), 0 at the end"
        )
    return lines


def format_history(history: Iterable[Mapping[str, Any]]) -> str:
    """Return a history as one line.

    Args:
        history: as `extend_history` returns it.

    Example:
        >>> format_history([{"step": 900, "changes": {"max_steps": [900, 1800]}}])
        'from step 900 on: max_steps 1800 instead of 900'
    """
    return "; ".join(
        f"from step {entry['step']} on: "
        + ", ".join(f"{key} {after} instead of {before}" for key, (before, after) in entry["changes"].items())
        for entry in history
    )
