"""Configurations: the arguments of an object's constructor, as a read-only mapping and as JSON.

`DDIMScheduler` and `UNet2DModel` record the arguments of their constructors in `.config`, as `diffusers` does, so that
`Class.from_config(other.config)` builds an equal object and `config.json` describes a model without its weights.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, ParamSpec, Self

from ddim.io.json_files import to_json
from ddim.version import __version__

logger = logging.getLogger(__name__)
P = ParamSpec("P")


class FrozenConfig(dict[str, Any]):
    """A read-only dictionary whose entries are also attributes.

    Example:
        >>> config = FrozenConfig(in_channels=3)
        >>> config["in_channels"], config.in_channels
        (3, 3)
    """

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
    """Decorate an `__init__` so that its arguments, defaults included, become `self.config`.

    Args:
        init: the constructor.

    Returns:
        The constructor that records its arguments before it runs.

    Example:
        >>> class Schedule(ConfigMixin):
        ...     @register_to_config
        ...     def __init__(self, steps: int = 1000) -> None:
        ...         pass
        >>> Schedule().config
        {'steps': 1000}
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        (_, instance), *arguments = bound.arguments.items()
        # nn.Module.__setattr__ must not run before nn.Module.__init__.
        object.__setattr__(instance, "config", FrozenConfig(arguments))
        init(*args, **kwargs)

    return wrapped


class ConfigMixin:
    """Mixin for classes that are built from a configuration and can be written as one.

    Attributes:
        config_name: the name of the class's configuration file.
        config: the arguments of the constructor.
    """

    config_name: ClassVar[str]
    config: FrozenConfig

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Build an instance from the entries of a configuration that the constructor accepts.

        Other entries are logged and ignored: configurations of related classes, such as a `DDPMScheduler`'s, hold more.

        Args:
            config: a configuration, such as another object's `.config` or a parsed `config.json`.
            overrides: constructor arguments that take precedence over `config`.

        Returns:
            The instance.

        Raises:
            TypeError: if `config` is not a mapping, or an override is not an argument of the constructor.
            ValueError: if the constructor refuses a value.

        Example:
            >>> from ddim import DDIMScheduler
            >>> scheduler = DDIMScheduler.from_config({"num_train_timesteps": 500}, beta_schedule="scaled_linear")
            >>> scheduler.config.num_train_timesteps, scheduler.config.beta_schedule
            (500, 'scaled_linear')
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"config must be a mapping, got {type(config).__name__}")
        accepted = list(inspect.signature(cls.__init__).parameters)[1:]
        unknown = sorted(key for key in config if key not in accepted and not key.startswith("_"))
        if unknown:
            logger.info("%s ignores these entries of a configuration: %s", cls.__name__, ", ".join(unknown))
        return cls(**{key: config[key] for key in accepted if key in config} | overrides)

    def config_json(self) -> str:
        """Return the text of this object's `config.json`: its arguments, the class and the version, keys sorted.

        Example:
            >>> from ddim import DDIMScheduler
            >>> '"_class_name": "DDIMScheduler"' in DDIMScheduler().config_json()
            True
        """
        entries = {"_class_name": type(self).__name__, "_ddim_version": __version__, **self.config}
        return to_json(entries)
