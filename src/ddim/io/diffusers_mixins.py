"""The classes of `diffusers` as further bases of this library's classes, once the program imports them.

Pipelines of `diffusers` save and accept only components that are instances of its `ModelMixin` or `SchedulerMixin`, and
scripts find layers by their class: those that get adapters, are frozen or pruned. This library does not import
`diffusers`, so its classes join those when they are there: they become bases of the classes, after all others, so that
nothing of this library changes. What is replaced in a class of `diffusers` has no effect here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, NoReturn

from torch import nn

BLOCKS = "models.unets.unet_2d_blocks"
COUNTERPARTS = {
    "ddim.io.config.FrozenConfig": "configuration_utils.FrozenDict",
    "ddim.outputs.Output": "utils.outputs.BaseOutput",
    "ddim.outputs.UNet2DOutput": "models.unets.unet_2d.UNet2DOutput",
    "ddim.outputs.DDIMSchedulerOutput": "schedulers.scheduling_ddim.DDIMSchedulerOutput",
    "ddim.outputs.ImagePipelineOutput": "pipelines.pipeline_utils.ImagePipelineOutput",
    "ddim.nn.layers.Timesteps": "models.embeddings.Timesteps",
    "ddim.nn.layers.GaussianFourierProjection": "models.embeddings.GaussianFourierProjection",
    "ddim.nn.layers.TimestepEmbedding": "models.embeddings.TimestepEmbedding",
    "ddim.nn.layers.Downsample2D": "models.downsampling.Downsample2D",
    "ddim.nn.layers.Upsample2D": "models.upsampling.Upsample2D",
    "ddim.nn.layers.ResnetBlock2D": "models.resnet.ResnetBlock2D",
    "ddim.nn.layers.Attention": "models.attention_processor.Attention",
    "ddim.unet.DownBlock2D": f"{BLOCKS}.DownBlock2D",
    "ddim.unet.AttnDownBlock2D": f"{BLOCKS}.AttnDownBlock2D",
    "ddim.unet.ResnetDownsampleBlock2D": f"{BLOCKS}.ResnetDownsampleBlock2D",
    "ddim.unet.UNetMidBlock2D": f"{BLOCKS}.UNetMidBlock2D",
    "ddim.unet.UpBlock2D": f"{BLOCKS}.UpBlock2D",
    "ddim.unet.AttnUpBlock2D": f"{BLOCKS}.AttnUpBlock2D",
    "ddim.unet.ResnetUpsampleBlock2D": f"{BLOCKS}.ResnetUpsampleBlock2D",
}
"""Classes of this library, and those of `diffusers` that `isinstance` takes their instances for."""

_waiting: list[tuple[type | str, tuple[str, ...]]] = [(ours, (theirs,)) for ours, theirs in COUNTERPARTS.items()]
"""Classes, or their full names, and the names of their further bases."""


def join_mixins(cls: type, *names: str) -> None:
    """Make a class a subclass of mixins of `diffusers`: now if they are imported, else as soon as they are.

    Args:
        cls: the class.
        names: `module.Class` inside `diffusers`.

    Example:
        >>> class Schedule(dict):
        ...     pass
        >>> join_mixins(Schedule, "configuration_utils.ConfigMixin")
    """
    _waiting.append((cls, names))
    _join_waiting()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _join_waiting() -> None:
    """Add their bases to the classes of which, and of whose bases, all modules have been imported."""
    for entry in list(_waiting):
        ours, names = entry
        cls = _find(ours) if isinstance(ours, str) else ours
        mixins = [_find(f"diffusers.{name}") for name in names]
        if cls is None or None in mixins:
            continue
        _waiting.remove(entry)
        if isinstance(ours, str):
            mixins = [_without_members(mixin) if issubclass(mixin, nn.Module) else mixin for mixin in mixins]
        # nn.Module is a base of ModelMixin and must not stand before it.
        bases = [base for base in cls.__bases__ if not any(issubclass(mixin, base) for mixin in mixins)]
        cls.__bases__ = (*bases, *mixins)


def _find(name: str) -> Any:
    """Return the class of a full name, `None` if it does not exist yet."""
    module, _, attribute = name.rpartition(".")
    return getattr(sys.modules.get(module), attribute, None)


def _without_members(layer: type[nn.Module]) -> type:
    """Return a subclass of a layer that has neither its constructor nor its methods, which need its attributes."""
    own = [name for name, member in vars(layer).items() if callable(member) and name not in dir(nn.Module)]
    members: dict[str, Any] = dict.fromkeys(own, property(_hide)) | {"__init__": nn.Module.__init__}
    if "set_processor" in own:
        members["processor"] = None  # which `diffusers` reads of every attention
    return type(layer.__name__, (layer,), members)


def _hide(layer: nn.Module) -> NoReturn:
    raise AttributeError


class _Finder(MetaPathFinder):
    """Finds modules that classes wait for as Python does, and has the classes join when one has been loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        library, _, module = fullname.partition(".")
        if library != "diffusers" or all(module != name.rpartition(".")[0] for _, names in _waiting for name in names):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads a module by its own loader, then has the waiting classes join."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _join_waiting()
