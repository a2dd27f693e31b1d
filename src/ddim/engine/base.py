"""What an engine is: the `Engine` protocol, and `EagerEngine`, which runs a network as it is."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ddim.diffusion.equations import Step
from ddim.diffusion.loop import StepFn, StepSettings
from ddim.unet import UNet2DModel
from ddim.untouched import NETWORK_FUNCTIONS, are_operators_transformed, are_original, has_hooks, is_unchanged

SETTING_TYPES = (bool, int, float, str, tuple, type(None))
"""The types of the attributes of modules that decide what they compute."""
STATE_NAMES = frozenset({"training", "sample_size", "gradient_checkpointing"})
"""Public attributes of modules that do not change what the network computes without gradients."""

UNET_ARGUMENTS = frozenset(inspect.signature(UNet2DModel.__init__).parameters) - {"self"}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Engine(Protocol):
    """Runs a network without gradients. Threads may share an engine."""

    @property
    def name(self) -> str:
        """The name under which manifests record the engine."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype in which the engine computes, whatever that of the weights; `None` for the network's."""

    @property
    def is_batch_invariant(self) -> bool:
        """Whether the prediction of a sample does not depend, to the bit, on the other samples of its batch."""

    def predict(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Evaluate the network.

        Args:
            sample: x_t, (N, C, H, W), in `dtype` or the network's dtype, and on its device.
            timestep: t, in 0..T-1; one number, a tensor (), or one per sample (N,).
            class_labels: int64 (N,), or embeddings (N, D), for class-conditional networks.

        Returns:
            The prediction, (N, C, H, W), in the sample's dtype and the default (contiguous) memory format.
        """

    def prepare(self, timesteps: Sequence[int], classes: Tensor | None = None) -> None:
        """Embed all timesteps and classes of a run before its first step. Others can still be predicted at.

        Args:
            timesteps: those of the run, in any order.
            classes: its distinct class labels, int64 (L,), in ascending order; `None` for an unconditional network.
        """

    def step_fn(self, latents: Tensor, steps: Sequence[Step], settings: StepSettings) -> StepFn | None:
        """Return a function that takes a whole step of a run, network and update together, in one launch.

        Args:
            latents: x at the first timestep, (N, C, H, W) float32 or float64 on the network's device.
            steps: all steps of the run, in order.
            settings: of the run.

        Returns:
            A function for one pass over `steps`, or `None` where steps have to be run from Python.
        """


class EagerEngine:
    """Runs a network by calling it.

    Args:
        unet: any object that is called as `unet(sample, timestep).sample`.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> engine = EagerEngine(lambda sample, timestep: SimpleNamespace(sample=sample * timestep))
        >>> engine.predict(torch.ones(1, 1, 1, 1), 3).item()
        3.0
    """

    dtype: torch.dtype | None = None
    is_batch_invariant = False

    def __init__(self, unet: Any) -> None:
        self.unet = unet

    @property
    def name(self) -> str:
        """The class name of the network, under which manifests record it."""
        return type(self.unet).__name__

    def predict(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Evaluate the network; see `Engine.predict`.

        Args:
            sample: x_t, (N, C, H, W).
            timestep: t; one number, a tensor (), or one per sample (N,).
            class_labels: int64 (N,), or embeddings (N, D), for class-conditional networks; not passed on if `None`.

        Returns:
            The prediction, (N, C, H, W).
        """
        labels = () if class_labels is None else (class_labels,)
        prediction: Tensor = self.unet(sample, timestep, *labels).sample
        return prediction

    def prepare(self, timesteps: Sequence[int], classes: Tensor | None = None) -> None:
        """Do nothing: the network embeds timesteps and classes when it is called.

        Args:
            timesteps: ignored.
            classes: ignored.
        """

    def step_fn(self, latents: Tensor, steps: Sequence[Step], settings: StepSettings) -> StepFn | None:
        """Return `None`: steps are run from Python.

        Args:
            latents: ignored.
            steps: ignored.
            settings: ignored.

        Returns:
            `None`.
        """
        return None


def unsupported_reason(unet: Any, device_type: str | None = None) -> str | None:
    """Return why the engine of a device type cannot run a network.

    Args:
        unet: any object.
        device_type: `cpu` or `cuda`; the type of the network's own device if `None`.

    Returns:
        The reason, to follow "the network runs as it is: "; `None` for a `UNet2DModel` as its configuration builds it,
        with untouched modules, in a supported dtype and on one device of that type.

    Example:
        >>> unsupported_reason(nn.Identity())
        'Identity is not a UNet2DModel'
    """
    if type(unet) is not UNet2DModel:
        return f"{type(unet).__name__} is not a UNet2DModel"
    modules = _modules_by_name(unet)
    if reason := _change_reason(unet, modules):
        return reason
    parameters = [p for module in modules.values() for p in module._parameters.values() if p is not None]
    if any(p.dtype != unet.dtype for p in parameters):
        return "its parameters have several dtypes"
    if unet.dtype not in DTYPES:
        return f"its dtype is {unet.dtype}"
    kind = "cuda" if (device_type or unet.device.type) == "cuda" else "cpu"
    if any(p.device.type != kind or p.device != unet.device for p in parameters):
        return f"its parameters are not all on {'one CUDA device' if kind == 'cuda' else 'the CPU'}"
    return None


class ModuleFacts(NamedTuple):
    """What a module computes, besides its weights' values.

    Attributes:
        kind: its class.
        settings: its public attributes that are numbers, strings, tuples or `None`, such as a convolution's stride.
        shapes: of its own parameters, `None` for those that it lacks, such as a bias.
    """

    kind: type[nn.Module]
    settings: dict[str, Any]
    shapes: dict[str, torch.Size | None]


@functools.lru_cache(maxsize=16)
def expected_modules(config_json: str) -> dict[str, ModuleFacts]:
    """Return the modules of the network that a configuration builds.

    Args:
        config_json: the arguments of `UNet2DModel` as JSON.

    Returns:
        The modules by name.

    Raises:
        ValueError: if the configuration builds none.

    Example:
        >>> expected_modules('{"block_out_channels": [32, 32, 32, 32]}')["conv_in"].settings["kernel_size"]
        (3, 3)
    """
    with torch.device("meta"):
        unet = UNet2DModel(**json.loads(config_json))
    facts = {}
    for name, module in unet.named_modules():
        public = {key: value for key, value in vars(module).items() if key[0] != "_" and key not in STATE_NAMES}
        settings = {key: value for key, value in public.items() if isinstance(value, SETTING_TYPES)}
        facts[name] = ModuleFacts(type(module), settings, _parameter_shapes(module))
    return facts


def _parameter_shapes(module: nn.Module) -> dict[str, torch.Size | None]:
    return {name: None if weights is None else weights.shape for name, weights in module._parameters.items()}


def _modules_by_name(unet: UNet2DModel) -> dict[str, nn.Module]:
    """Return what `named_modules` yields, in a third of its time: every sampling run begins with it."""
    modules: dict[str, nn.Module] = {"": unet}
    pending: list[tuple[str, nn.Module]] = [("", unet)]
    while pending:
        prefix, parent = pending.pop()
        for name, child in parent._modules.items():
            if child is not None:
                modules[prefix + name] = child
                if child._modules:
                    pending.append((f"{prefix}{name}.", child))
    return modules


def _change_reason(unet: UNet2DModel, modules: dict[str, nn.Module]) -> str | None:
    """Return how a network differs from the one that its configuration builds; `None` if it does not."""
    arguments = {key: value for key, value in unet.config.items() if key in UNET_ARGUMENTS}
    try:
        expected = expected_modules(json.dumps(arguments, sort_keys=True))
    except (TypeError, ValueError) as error:
        return f"its configuration does not build it: {error}"
    if are_operators_transformed():
        return "PyTorch's operators are transformed"
    if not are_original(NETWORK_FUNCTIONS):
        return "functions of PyTorch are patched"
    for name, module in modules.items():
        shown = name or type(unet).__name__
        if name not in expected:
            return f"{shown} has been added"
        kind, settings, shapes = expected[name]
        if not is_unchanged(module, kind):
            if type(module) is not kind:
                return f"{shown} has been replaced"
            return f"{shown} has hooks" if has_hooks(module) else f"{shown} has been patched"
        attributes = vars(module)
        if not settings.items() <= attributes.items():
            changed = next(key for key, value in settings.items() if attributes.get(key, nn.Module) != value)
            return f"{shown}.{changed} has been changed"
        if _parameter_shapes(module) != shapes:
            return f"{shown} has other parameters"
        if kind is nn.Dropout and module.training and attributes["p"] > 0:
            return f"{shown} is in training mode"
    missing = expected.keys() - modules.keys()
    return f"{min(missing)} has been removed" if missing else None
