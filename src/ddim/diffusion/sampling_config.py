"""`SamplingConfig`: the settings of the generative process, in one immutable value that every layer passes on.

It is importable without PyTorch, so that the command line and the web page can check settings before heavy imports.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ddim.validation import integer, real, shown

ORDERS = (1, 2, 3, 4)
"""The orders of the solvers."""


@dataclass(frozen=True)
class SamplingConfig:
    """The settings of the generative process.

    What depends on the model, such as the largest number of steps, is checked by `ddim.sampler.Sampler.plan`, which
    also fills in `timesteps` and `order`.

    Attributes:
        num_inference_steps: S, the number of steps, at least 1; ignored where `timesteps` is given.
        eta: the noise of the process, at least 0: 0 for DDIM, 1 for DDPM.
        timesteps: a custom subsequence of timesteps, strictly decreasing; `None` for that of the scheduler.
        order: the order of the solver, from 1 (DDIM) to 4; `None` for the scheduler's `solver_order`.
        use_sigma_hat: add noise with DDPM's larger variance; requires `eta=1`.
        use_clipped_model_output: recompute epsilon from the clipped x_0 in each step.

    Raises:
        ValueError: if a setting is out of range, or two exclude each other.
        TypeError: if `eta` is not a number.

    References:
        Equations (12) and (16) of arXiv 2010.02502; sigma-hat: section 5.

    Example:
        >>> SamplingConfig(num_inference_steps=20, timesteps=[900, 300, 0]).timesteps
        (900, 300, 0)
        >>> SamplingConfig(eta=0.5, order=2)
        Traceback (most recent call last):
        ValueError: order=2 requires eta=0 (deterministic sampling), got eta=0.5
    """

    num_inference_steps: int = 50
    eta: float = 0.0
    timesteps: Sequence[int] | None = None
    order: int | None = None
    use_sigma_hat: bool = False
    use_clipped_model_output: bool = False

    def __post_init__(self) -> None:
        eta = real("eta", self.eta, minimum=0)
        if self.order is not None:
            check_order(self.order, eta)
        if self.use_sigma_hat and eta != 1:
            raise ValueError(f"use_sigma_hat=True (DDPM's larger variance) requires eta=1, got eta={eta:g}")
        if self.timesteps is None:
            object.__setattr__(self, "num_inference_steps", integer("num_inference_steps", self.num_inference_steps, 1))
        else:
            entries: Any = self.timesteps.tolist() if hasattr(self.timesteps, "tolist") else self.timesteps
            if isinstance(entries, Iterable) and not isinstance(entries, str):
                object.__setattr__(self, "timesteps", tuple(entries))
        object.__setattr__(self, "eta", eta)
        object.__setattr__(self, "use_clipped_model_output", bool(self.use_clipped_model_output))

    def resolve_order(self, solver_order: int) -> int:
        """Return the order of the solver: the one that was given, or the scheduler's.

        Args:
            solver_order: the scheduler's, from 1 to 4.

        Raises:
            ValueError: if the scheduler's order is above 1 and the process has noise.

        Example:
            >>> SamplingConfig(order=1, eta=1).resolve_order(2)
            1
            >>> SamplingConfig(eta=1).resolve_order(2)
            Traceback (most recent call last):
            ValueError: the model's solver_order=2 requires eta=0 (deterministic sampling), got eta=1; give order=1
        """
        if self.order is not None:
            return self.order
        if solver_order > 1 and self.eta:
            raise ValueError(
                f"the model's solver_order={solver_order} requires eta=0 (deterministic sampling), "
                f"got eta={self.eta:g}; give order=1"
            )
        return solver_order

    def record(self) -> dict[str, Any]:
        """Return the settings as plain values under the keys of manifests.

        Example:
            >>> SamplingConfig(timesteps=(900, 0), order=1).record()
            {'timesteps': [900, 0], 'eta': 0.0, 'order': 1, 'sigma_hat': False}
        """
        return {
            "timesteps": None if self.timesteps is None else list(self.timesteps),
            "eta": self.eta,
            "order": self.order,
            "sigma_hat": bool(self.use_sigma_hat),
        } | ({"use_clipped_model_output": True} if self.use_clipped_model_output else {})

    def fingerprint(self) -> str:
        """Return a SHA-256, in hexadecimal, that two configurations share if and only if they sample alike.

        Timesteps that are given replace the number of steps; what is left to the scheduler is part of it as such.

        Example:
            >>> SamplingConfig(20).fingerprint() == SamplingConfig(20, eta=0).fingerprint()
            True
        """
        # Imported here: what only prints help should not wait for them.
        import hashlib
        import json

        length = self.num_inference_steps if self.timesteps is None else None
        text = json.dumps(self.record() | {"num_inference_steps": length}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def check_order(order: int, eta: float = 0.0) -> int:
    """Check the order of a solver.

    Args:
        order: from 1 to 4.
        eta: the noise of the process.

    Returns:
        The order.

    Raises:
        ValueError: for another order, or an order above 1 of a process with noise.

    Example:
        >>> check_order(2)
        2
    """
    if order not in ORDERS or isinstance(order, bool):
        raise ValueError(f"order must be 1 (DDIM) or 2, 3 or 4 (multistep methods), got {shown(order)}")
    if order > 1 and eta:
        raise ValueError(f"order={order} requires eta=0 (deterministic sampling), got eta={eta:g}")
    return order
