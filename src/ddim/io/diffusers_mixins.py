"""The mixins of `diffusers` as further bases of this library's classes, once the program imports that library.

Pipelines of `diffusers` save and accept only components that are instances of its `ModelMixin` or `SchedulerMixin`:
others are left out with a line in the log. This library does not import `diffusers`, so its classes join those mixins
when they are there: they become bases of the classes, after all others, so that nothing of this library changes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

TRIGGER = "diffusers.pipelines.pipeline_utils"
"""The module that all pipelines need; it imports those of the mixins."""

_waiting: list[tuple[type, tuple[str, ...]]] = []


def join_mixins(cls: type, *names: str) -> None:
    """Make a class a subclass of mixins of `diffusers`: now if that is imported, else as soon as it is.

    Args:
        cls: the class.
        names: `module.Class` inside `diffusers`.

    Example:
        >>> class Schedule(dict):
        ...     pass
        >>> join_mixins(Schedule, "configuration_utils.ConfigMixin")
    """
    _waiting.append((cls, names))
    if TRIGGER in sys.modules:
        _join_waiting()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _join_waiting() -> None:
    while _waiting:
        cls, names = _waiting.pop()
        mixins = []
        for name in names:
            module, _, attribute = name.rpartition(".")
            mixins.append(getattr(sys.modules[f"diffusers.{module}"], attribute))
        # nn.Module is a base of ModelMixin and must not stand before it.
        bases = [base for base in cls.__bases__ if not any(issubclass(mixin, base) for mixin in mixins)]
        cls.__bases__ = (*bases, *mixins)


class _Finder(MetaPathFinder):
    """Finds `TRIGGER` as Python does, and has the waiting classes join when it has been loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TRIGGER:
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
