"""Configurations: the arguments of an object's constructor, as a read-only mapping and as JSON.

`DDIMScheduler` and `UNet2DModel` record the arguments of their constructors in `.config`, so that
`Class.from_config(other.config)` builds an equal object and `config.json` describes a model without its weights. The
entries and their meaning are those of `diffusers`, so that configurations travel between classes of both libraries:

    _class_name, ...       entries that begin with an underscore are about a file, not arguments
    _use_default_values    arguments that were not given: another class takes its own defaults for them
    foreign entries        those of another class are kept, so that the way back loses nothing
    _ddim                  arguments that only this library has, where they differ from their defaults
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar, cast

from ddim.annotations import check_arguments
from ddim.io.hub import pop_hub_options, read_config, save_and_push
from ddim.io.json_files import to_json
from ddim.validation import join_choices, list_unknown, shown
from ddim.version import __version__

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T", bound="ConfigMixin")

OWN = "_ddim"
"""The entry that holds the arguments that only this library has. Its underscore makes other libraries pass it on."""
DEFAULTED = "_use_default_values"
OF_THE_FILE = "_ddim_version"
NOT_SAVED = (DEFAULTED, "_ignore_files", "_name_or_path")
OF_THE_DOWNLOAD = ("proxies", "mirror", "user_agent", "local_dir", "local_dir_use_symlinks")
"""Options of a download that are accepted and do nothing: the hub client has its own."""
DIFFUSERS_VERSION = "0.42.1"
"""The version of `diffusers` whose files are written."""


class FrozenConfig(OrderedDict[str, Any]):
    """A dictionary whose entries are also attributes; entries cannot be removed.

    It is what `FrozenDict` of `diffusers` is. An attribute that is assigned takes effect in the object whose
    configuration this is, which reads attributes; an entry that is assigned is what files, `from_config` and
    `register_to_config` hold. `register_to_config(name=value)` changes both.

    Raises:
        TypeError: when an entry is removed, or entries are updated.

    Example:
        >>> config = FrozenConfig(in_channels=3)
        >>> config["in_channels"], config.in_channels
        (3, 3)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        OrderedDict.__init__(self, *args, **kwargs)
        vars(self).update(self)

    def __getattr__(self, name: str) -> Any:
        # Without a search for the nearest: modules look up their submodules here before they find them.
        raise AttributeError(f"the configuration has no entry {name!r}")

    # Not those of FrozenDict, which may have become a base, and which look for an attribute that is never there.
    __setattr__ = object.__setattr__
    __setitem__ = OrderedDict.__setitem__

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "a configuration is read-only; change it with register_to_config(name=value), or build a new object with "
            "from_config(config, name=value)"
        )

    __delitem__ = pop = update = setdefault = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),), dict(vars(self))


def public_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a configuration that are arguments, not notes about a file.

    Args:
        config: the configuration.

    Example:
        >>> public_entries({"in_channels": 3, "_name_or_path": "mnist"})
        {'in_channels': 3}
    """
    return {name: value for name, value in config.items() if not name.startswith("_")}


def register_to_config(init: Callable[Concatenate[T, P], None]) -> Callable[Concatenate[T, P], None]:
    """Decorate an `__init__` so that its arguments, defaults included, become `self.config`.

    Keyword arguments that begin with an underscore are recorded and not passed on.

    Args:
        init: the constructor of a class with `ConfigMixin`.

    Returns:
        The constructor that records its arguments before it runs.

    Example:
        >>> class Schedule(ConfigMixin):
        ...     @register_to_config
        ...     def __init__(self, steps: int = 1000) -> None:
        ...         pass
        >>> dict(Schedule(steps=10).config)
        {'steps': 10}
        >>> dict(Schedule().config)
        {'steps': 1000, '_use_default_values': ['steps']}
    """
    signature = inspect.signature(init)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())

    @functools.wraps(init)
    def wrapped(self: T, *args: P.args, **kwargs: P.kwargs) -> None:
        private = {name: kwargs[name] for name in kwargs if name.startswith("_")}
        passed: dict[str, Any] = {name: value for name, value in kwargs.items() if name not in private}
        if not takes_any and (unknown := passed.keys() - signature.parameters.keys()):
            raise TypeError(
                f"{type(self).__name__} has no argument {list_unknown(sorted(unknown), signature.parameters)}"
            )
        bound = signature.bind(self, *args, **passed)
        given = set(bound.arguments)
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])
        # A constructor with **kwargs: what they hold are arguments like others.
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name)
        if is_own := init.__module__.startswith(f"{__package__.partition('.')[0]}."):
            check_arguments(init, arguments)
        arguments = {name: value for name, value in arguments.items() if name not in self.ignore_for_config}
        own = {name: arguments.pop(name) for name in self.own_settings if name in arguments}
        own = {name: value for name, value in own.items() if value != self.own_settings[name]}
        defaulted = [name for name in arguments if name in signature.parameters and name not in given]
        if is_own and type(self).__module__ == init.__module__:
            # Pipelines of diffusers take a component's library from here when they write model_index.json; files of
            # this library's classes are theirs. The class itself keeps its module, so that pickles find it.
            object.__setattr__(self, "__module__", "diffusers")
        self.register_to_config(**private, **arguments, **({OWN: own} if own else {}))
        if defaulted:
            self.register_to_config(**{DEFAULTED: defaulted})
        init(self, *args, **passed)

    return wrapped  # type: ignore[return-value]


class ConfigMixin:
    """Mixin for classes that are built from a configuration and can be written as one.

    Attributes:
        config_name: the name of the class's configuration file.
        ignore_for_config: arguments of the constructor that are not recorded.
        own_settings: arguments that only this library has, with their defaults; recorded in the entry `_ddim`, and only
            where they differ.
        foreign_settings: entries of related classes' configurations, which are kept without a word.
        has_compatibles: whether other classes take this one's configuration.
        config: the arguments of the constructor.
    """

    config_name: ClassVar[str]
    ignore_for_config: ClassVar[Collection[str]] = []
    own_settings: ClassVar[Mapping[str, Any]] = {}
    foreign_settings: ClassVar[Collection[str]] = ()
    has_compatibles: ClassVar[bool] = False

    @property
    def config(self) -> FrozenConfig:
        """The arguments of the constructor, and what the configuration that it was built from held besides."""
        try:
            return self.__dict__["_internal_dict"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has not been built: it has no config") from None

    def register_to_config(self, /, **entries: Any) -> None:
        """Change or add entries of the configuration; what reads them from there follows.

        Args:
            entries: by name. For a network that was changed, such as `in_channels=6` after `conv_in` was replaced.

        Example:
            >>> from ddim import DDIMScheduler
            >>> scheduler = DDIMScheduler()
            >>> scheduler.register_to_config(clip_sample=False)
            >>> scheduler.config.clip_sample
            False
        """
        # What register_to_config of `diffusers` records for a constructor with **kwargs.
        entries.pop("kwargs", None)
        config = {**self.__dict__.get("_internal_dict", {}), **entries}
        if DEFAULTED in config and DEFAULTED not in entries:
            config[DEFAULTED] = [name for name in config[DEFAULTED] if name not in entries]
        # nn.Module.__setattr__ must not run before nn.Module.__init__.
        object.__setattr__(self, "_internal_dict", FrozenConfig(config))

    def __getattr__(self, name: str) -> Any:
        try:
            # nn.Module finds its parameters and submodules in a __getattr__.
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError as error:
            config = self.__dict__.get("_internal_dict", {})
            if name.startswith("_") or name not in config:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from error
        warnings.warn(
            f"reading {name} of the configuration as an attribute of {type(self).__name__} is deprecated; use "
            f".config.{name}",
            FutureWarning,
            stacklevel=2,
        )
        return config[name]

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **overrides: Any) -> Self:
        """Build an instance from the entries of a configuration that the constructor accepts.

        Arguments that the configuration's object was not given (`_use_default_values`) get this class's defaults. Other
        entries are kept in the new `.config`; those that are nobody's are logged.

        Args:
            config: a configuration, such as another object's `.config` or a parsed `config.json`. A folder or hub id
                is read with `load_config`; this is deprecated.
            return_unused_kwargs: return the entries that were not used, too.
            overrides: constructor arguments that take precedence over `config`.

        Returns:
            The instance; or the instance and a dictionary of the unused entries.

        Raises:
            TypeError: if `config` is not a mapping, or an override is not an argument of the constructor.
            ValueError: if the constructor refuses a value, or `config` is missing.

        Example:
            >>> from ddim import DDIMScheduler
            >>> scheduler = DDIMScheduler.from_config({"num_train_timesteps": 500}, beta_schedule="scaled_linear")
            >>> scheduler.config.num_train_timesteps, scheduler.config.beta_schedule
            (500, 'scaled_linear')
        """
        config = overrides.pop("pretrained_model_name_or_path", config)
        if config is None:
            raise ValueError("config must be a mapping such as another object's .config, got None")
        if isinstance(config, str | os.PathLike):
            warnings.warn(
                f"a folder or hub id as config is deprecated; use {cls.__name__}.from_pretrained, or load_config",
                FutureWarning,
                stacklevel=2,
            )
            config, overrides = cls.load_config(config, return_unused_kwargs=True, **overrides)
        if not isinstance(config, Mapping):
            raise TypeError(f"config must be a mapping, got {type(config).__name__}")
        arguments, unused, hidden = cls.extract_init_dict(config, **overrides)
        if (unknown := overrides.keys() & unused.keys()) and not return_unused_kwargs:
            accepted = inspect.signature(cls.__init__).parameters
            raise TypeError(f"{cls.__name__} has no argument {list_unknown(sorted(unknown), accepted)}")
        instance = cls(**arguments)
        kept = {name: value for name, value in hidden.items() if name != OF_THE_FILE}
        instance.register_to_config(**kept | ({"_class_name": cls.__name__} if "_class_name" in kept else {}))
        return cast(Self, (instance, unused | hidden)) if return_unused_kwargs else instance

    @classmethod
    def extract_init_dict(
        cls, config: Mapping[str, Any], **overrides: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Sort the entries of a configuration by what this class does with them.

        Args:
            config: the configuration.
            overrides: arguments that take precedence.

        Returns:
            Three dictionaries: the constructor's arguments; overrides and entries that are nobody's; and all other
            entries, which are kept in the configuration.

        Example:
            >>> from ddim import DDIMScheduler
            >>> DDIMScheduler.extract_init_dict({"beta_end": 0.01, "algorithm_type": "dpmsolver"})
            ({'beta_end': 0.01}, {}, {'algorithm_type': 'dpmsolver'})
        """
        defaulted = config.get(DEFAULTED, ())
        if not isinstance(defaulted, list | tuple | set | frozenset):
            raise TypeError(f"{DEFAULTED} must be a list of names, got {shown(defaulted)}")
        entries = {name: value for name, value in config.items() if name != DEFAULTED and name not in defaulted}
        own = _pop_own_settings(entries, cls.own_settings)
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        accepted = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
        shared = accepted - set(cls.own_settings) - set(cls.ignore_for_config)
        arguments = {name: value for name, value in entries.items() if name in shared} | own
        arguments |= {name: value for name, value in overrides.items() if name in accepted}
        unused = {name: value for name, value in overrides.items() if name not in accepted}
        hidden = {name: value for name, value in entries.items() if name not in shared}
        strange = {k: v for k, v in hidden.items() if not k.startswith("_") and k not in cls.foreign_settings}
        if strange and config.get("_class_name", cls.__name__) == cls.__name__:
            listed = list_unknown(strange, accepted)
            logger.warning("%s ignores these entries of a configuration: %s", cls.__name__, listed)
        return arguments, strange | unused, hidden

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        return_unused_kwargs: bool = False,
        return_commit_hash: bool = False,
        **options: Any,
    ) -> Any:
        """Read the configuration file of this class from a model.

        Args:
            pretrained_model_name_or_path: the name of a built-in model, a folder, a hub id, or the file itself.
            return_unused_kwargs: return the options that are not about finding the file, too.
            return_commit_hash: return the hub's commit, too; `None` for a folder.
            options: `subfolder`, and those of `ddim.io.hub.HubOptions`.

        Returns:
            The configuration as a dictionary, or a tuple of it and what was asked for besides.

        Raises:
            FileNotFoundError: if the model does not exist or has no such file.
            ValueError: if the file is not JSON.

        Example:
            >>> from ddim import UNet2DModel
            >>> UNet2DModel.load_config("mnist", subfolder="unet")["in_channels"]
            1
        """
        subfolder = options.pop("subfolder", None)
        for name in OF_THE_DOWNLOAD:
            options.pop(name, None)
        hub_options = pop_hub_options(options)
        config, commit = read_config(pretrained_model_name_or_path, cls.config_name, subfolder, hub_options)
        result = (config, *([options] if return_unused_kwargs else []), *([commit] if return_commit_hash else []))
        return config if len(result) == 1 else result

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """Call `load_config`, of which this is a deprecated alias.

        Args:
            args: as for `load_config`.
            kwargs: as for `load_config`.
        """
        warnings.warn("get_config_dict is deprecated; use load_config", FutureWarning, stacklevel=2)
        return cls.load_config(*args, **kwargs)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """Return the names of a constructor's arguments, with `self`, which scripts compare configurations with."""
        return set(inspect.signature(input_class.__init__).parameters)  # type: ignore[misc]

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **options: Any) -> None:
        """Write the configuration file of this object into a folder.

        Args:
            save_directory: the folder; created if missing.
            push_to_hub: upload it, too.
            options: of the upload: `repo_id` (defaults to the folder's name), `private`, `token`, `commit_message`.

        Raises:
            OSError: if it cannot be written.
            RuntimeError: if the hub cannot be reached or refuses.

        Example:
            >>> import tempfile
            >>> from ddim import DDIMScheduler
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     DDIMScheduler().save_config(folder)
            ...     os.listdir(folder)
            ['scheduler_config.json']
        """

        def write(target: Path) -> None:
            (target / self.config_name).write_text(self.to_json_string(), encoding="utf-8")

        save_and_push(write, Path(save_directory), push_to_hub, type(self).__name__, options)

    def to_json_string(self) -> str:
        """Return the text of this object's configuration file: its entries, the class and the versions, keys sorted.

        The class and the version of `diffusers` become entries of the configuration, too.

        Example:
            >>> from ddim import DDIMScheduler
            >>> '"_class_name": "DDIMScheduler"' in DDIMScheduler().to_json_string()
            True
        """
        notes = {"_class_name": type(self).__name__, "_diffusers_version": DIFFUSERS_VERSION}
        for name, value in notes.items():
            self.config[name] = value
        return to_json({**self._file_entries(), **notes, OF_THE_FILE: __version__})

    def _file_entries(self) -> dict[str, Any]:
        """Return the entries of the configuration that are written into files."""
        return {name: value for name, value in self.config.items() if name not in NOT_SAVED}

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the text of this object's configuration file.

        Args:
            json_file_path: the file.
        """
        Path(json_file_path).write_text(self.to_json_string(), encoding="utf-8")


def _pop_own_settings(entries: dict[str, Any], own_settings: Mapping[str, Any]) -> dict[str, Any]:
    """Take the arguments that only this library has out of a configuration's entries, and return them.

    Version 0.1 wrote them among the others, recognizable by `timesteps_by_steps`, a name that nobody else has.
    """
    own = entries.pop(OWN, {})
    if not isinstance(own, Mapping) or own.keys() - own_settings.keys():
        raise ValueError(
            f"{OWN} must hold {join_choices(own_settings) if own_settings else 'nothing'}, got {shown(own)}"
        )
    if "timesteps_by_steps" in entries and "timesteps_by_steps" in own_settings:
        own = {name: entries.pop(name) for name in own_settings if name in entries} | dict(own)
    return dict(own)
