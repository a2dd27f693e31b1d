"""Configurations: the arguments an object was built with, kept read-only and as JSON.

`DDIMScheduler` and `UNet2DModel` record the arguments of their constructors in `.config`, as `diffusers` does, so that
`Class.from_config(other.config)` builds a twin and `config.json` describes a model without its weights.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, Self

from ddim.version import __version__

logger = logging.getLogger(__name__)
P = ParamSpec("P")


class FrozenConfig(dict[str, Any]):
    """A read-only dictionary whose entries are also attributes: `config["in_channels"] is config.in_channels`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the configuration has no entry {name!r}") from None

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a configuration is read-only; build a new object with from_config(config, name=value)")

    __setattr__ = __setitem__ = __delitem__ = __delattr__ = _refuse
    pop = popitem = clear = update = setdefault = __ior__ = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenConfig, (dict(self),)


def register_to_config(init: Callable[P, None]) -> Callable[P, None]:
    """Decorate an `__init__` so that its arguments, defaults included, become `self.config`."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        (_, instance), *arguments = bound.arguments.items()
        # Past nn.Module.__setattr__, which must not run before nn.Module.__init__.
        object.__setattr__(instance, "config", FrozenConfig(arguments))
        init(*args, **kwargs)

    return wrapped


class ConfigMixin:
    """Build from and turn into a configuration. A class names its file in `config_name`."""

    config_name: ClassVar[str]
    config: FrozenConfig

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Build an instance from the entries of `config` that the constructor knows.

        Other entries are dropped: configurations of related classes (a `DDPMScheduler`'s, say) carry more than is
        needed here.

        Args:
            config: a configuration, such as another object's `.config` or a parsed `config.json`.
            overrides: constructor arguments that take precedence; an unknown one is a `TypeError`.

        Raises:
            TypeError: if `config` is not a mapping, or an override is not an argument of the constructor.
            ValueError: if a value is not allowed.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"from_config takes a configuration (a mapping), not {type(config).__name__}")
        known = list(inspect.signature(cls.__init__).parameters)[1:]
        unknown = sorted(key for key in config if key not in known and not key.startswith("_"))
        if unknown:
            logger.info("%s ignores these entries of a configuration: %s", cls.__name__, ", ".join(unknown))
        return cls(**{key: config[key] for key in known if key in config} | overrides)

    def config_json(self) -> str:
        """The configuration as the text of a `config.json`: sorted keys, the class and version beside the arguments."""
        entries = {"_class_name": type(self).__name__, "_ddim_version": __version__, **self.config}
        return to_json(entries)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def to_json(content: Mapping[str, Any]) -> str:
    """JSON as in configuration files: indented, keys sorted; arrays (trained betas) as lists, paths as text."""
    return json.dumps(content, indent=2, sort_keys=True, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
