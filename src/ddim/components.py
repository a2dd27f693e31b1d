"""`ComponentPipeline`: a pipeline as a set of named components that are registered, moved, saved and loaded together.

Classes derived from it work as those derived from `DiffusionPipeline` of `diffusers` do: their constructor's arguments
are their components, `register_modules` makes them attributes, and a folder holds one folder per component and

    model_index.json        {"_class_name": ..., "unet": ["diffusers", "UNet2DModel"], ...}: library and class of each

Loading imports nothing by a name from a file. A component's class is looked up in this library, in `diffusers` and
`transformers` where they are installed, and among the modules that the program has imported already.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from PIL import Image
from torch import nn

from ddim.devices import choose_device, execution_device
from ddim.extras import check_xformers
from ddim.io import hub
from ddim.io.config import ConfigMixin, FrozenConfig
from ddim.io.images import as_pil, to_bytes
from ddim.io.json_files import read_json
from ddim.io.pretrained import drop_unused_options, resolve_device_map, resolve_dtype
from ddim.io.runs import as_model, split_variant
from ddim.io.weights import MAX_SHARD_SIZE
from ddim.validation import nearest, shown

LIBRARIES = ("diffusers", "transformers")
"""Libraries whose classes a `model_index.json` may name without the program having imported them."""
OWN_CLASSES = ("UNet2DModel", "DDIMScheduler", "DDIMInverseScheduler", "DDIMPipeline")
"""Classes that stand in files under the name of `diffusers`, which has them too."""


class ComponentPipeline(ConfigMixin, hub.PushToHub):
    """A set of named components.

    A subclass takes its components as arguments of its constructor and passes them to `register_modules`. Arguments
    with defaults that are not components are settings; `register_to_config(name=value)` saves them.

    Attributes:
        _optional_components: names of components that may be `None`.
        offload_device: where networks run, if `enable_model_cpu_offload` keeps them on the CPU in between; else `None`.

    Example:
        >>> from ddim import DDIMScheduler
        >>> class Noiser(ComponentPipeline):
        ...     def __init__(self, scheduler):
        ...         self.register_modules(scheduler=scheduler)
        >>> dict(Noiser(DDIMScheduler()).config)
        {'scheduler': ('diffusers', 'DDIMScheduler')}
    """

    config_name = "model_index.json"
    _optional_components: ClassVar[Sequence[str]] = []
    _registered: tuple[str, ...] = ()
    offload_device: torch.device | None = None

    def register_modules(self, **modules: Any) -> None:
        """Make components attributes of the pipeline.

        Args:
            modules: the components by name; `None` for one that is missing.

        Example:
            >>> from ddim import DDIMPipeline, DDIMScheduler
            >>> pipe = DDIMPipeline.from_pretrained("mnist")
            >>> pipe.register_modules(scheduler=DDIMScheduler(clip_sample=False))
            >>> pipe.scheduler.config.clip_sample
            False
        """
        for name, module in modules.items():
            setattr(self, name, module)
        self._registered = tuple(dict.fromkeys((*self._registered, *modules)))

    @property
    def config(self) -> FrozenConfig:
        """Library and class of each component, and the settings that were registered."""
        classes = {name: _library_and_class(getattr(self, name)) for name in self._registered}
        recorded = self.__dict__.get("_internal_dict")
        if recorded is None or any(recorded.get(name) != entry for name, entry in classes.items()):
            self.register_to_config(**classes)
        return cast(FrozenConfig, self.__dict__["_internal_dict"])

    @property
    def components(self) -> dict[str, Any]:
        """The components by name, from which another pipeline can be built without copying weights.

        Components that the constructor has defaults for are left out, unless `_optional_components` names them.
        """
        return {name: getattr(self, name) for name in self._registered if name in _component_names(type(self), {})}

    @property
    def name_or_path(self) -> str | None:
        """What `from_pretrained` loaded; `None` for a pipeline that was built."""
        return cast(str | None, self.config.get("_name_or_path"))

    @property
    def device(self) -> torch.device:
        """The device of the first network."""
        return next((next(network.parameters()).device for network in self._networks()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first network."""
        return next((next(network.parameters()).dtype for network in self._networks()), torch.float32)

    @property
    def _execution_device(self) -> torch.device:
        """The device on which networks run: that of the networks, unless they are offloaded in between."""
        return self.offload_device or next((execution_device(network) for network in self._networks()), self.device)

    def _networks(self) -> list[nn.Module]:
        modules = (getattr(self, name) for name in self._registered)
        return [
            module for module in modules if isinstance(module, nn.Module) and any(True for _ in module.parameters())
        ]

    def to(
        self,
        *args: str | torch.device | torch.dtype,
        device: str | torch.device | None = None,
        dtype: Any = None,
        silence_dtype_warnings: bool = False,
    ) -> Self:
        """Move all networks to a device, a dtype, or both.

        Args:
            args: a device, a floating dtype, or both, in any order.
            device: the device by name.
            dtype: the dtype by name.
            silence_dtype_warnings: has no effect: such warnings do not exist here.

        Returns:
            The pipeline itself.

        Raises:
            ValueError: if the machine has no such device.
            TypeError: for anything else than a device and a floating dtype.

        Example:
            >>> from ddim import DDIMPipeline
            >>> DDIMPipeline.from_pretrained("mnist").to("cpu", torch.bfloat16).dtype
            torch.bfloat16
        """
        for arg in args:
            if isinstance(arg, torch.dtype):
                dtype = arg
            else:
                device = arg
        if not isinstance(device, str | torch.device | None):
            raise TypeError(f"device must be a device such as 'cpu' or 'cuda:0', got {shown(device)}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating dtype such as torch.bfloat16, got {shown(dtype)}")
        chosen = None if device is None else choose_device(device)
        for name in self._registered:
            module = getattr(self, name)
            if hasattr(module, "to") and not isinstance(module, torch.Tensor):
                module.to(device=chosen, dtype=dtype)
        return self

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: str | torch.device | None = None) -> None:
        """Keep networks on the CPU, and move them to another device only while the pipeline runs.

        Args:
            gpu_id: the device's index.
            device: the device; defaults to the machine's accelerator.

        Raises:
            RuntimeError: without a `device`, if the machine has no accelerator.
            ValueError: if the machine has no such device, or for two indices.

        Example:
            >>> from ddim import DDIMPipeline
            >>> pipe = DDIMPipeline.from_pretrained("mnist")
            >>> pipe.enable_model_cpu_offload(device="cpu")
            >>> pipe.offload_device
            device(type='cpu', index=0)
        """
        if device is None and torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator()
        if device is None:
            raise RuntimeError("offloading requires an accelerator, and this machine has none")
        chosen = torch.device(device)
        if gpu_id is not None and chosen.index is not None:
            raise ValueError(f"device must have no index where gpu_id is given, got {chosen} and gpu_id={gpu_id}")
        index = chosen.index if gpu_id is None else gpu_id
        self.offload_device = choose_device(torch.device(chosen.type, index or 0))
        self.to("cpu")

    enable_sequential_cpu_offload = enable_model_cpu_offload

    def maybe_free_model_hooks(self) -> None:
        """Move networks back to the CPU where `enable_model_cpu_offload` is on; pipelines call this last."""
        if self.offload_device is not None:
            self.to("cpu")

    def remove_all_hooks(self) -> None:
        """Undo `enable_model_cpu_offload`."""
        self.offload_device = None

    def _no_effect(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: attention always runs as fast and in as little memory as PyTorch's fused operator.

        Args:
            args: ignored.
            kwargs: ignored.
        """

    enable_attention_slicing = disable_attention_slicing = set_attention_slice = _no_effect
    disable_xformers_memory_efficient_attention = _no_effect

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Do nothing: attention runs by PyTorch's fused operator, which is as fast.

        Args:
            attention_op: ignored.

        Raises:
            ModuleNotFoundError: if xformers is not installed, which scripts catch.
        """
        check_xformers()

    @staticmethod
    def numpy_to_pil(images: Any) -> list[Image.Image]:
        """Convert pixels to PIL images.

        Args:
            images: floats in [0, 1], (N, H, W, C) or (H, W, C); C is 1, 3 or 4.

        Example:
            >>> import numpy as np
            >>> ComponentPipeline.numpy_to_pil(np.zeros((2, 8, 8, 3)))[0].size
            (8, 8)
        """
        return [as_pil(pixels) for pixels in to_bytes(images if images.ndim == 4 else images[None])]

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Self:
        """Build a pipeline from the components of another, which they are shared with.

        Args:
            pipeline: a pipeline of either library.
            kwargs: `torch_dtype` (or `dtype`), to which the networks are cast; defaults to float32, and `None` leaves
                them alone. Components and settings that replace or complete those of the pipeline.

        Raises:
            ValueError: if components are missing.

        Example:
            >>> from ddim import DDIMPipeline
            >>> pipe = DDIMPipeline.from_pretrained("mnist")
            >>> DDIMPipeline.from_pipe(pipe).unet is pipe.unet
            True
        """
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", torch.float32))
        parameters = _arguments(cls)
        shared = {name: module for name, module in pipeline.components.items() if name in parameters}
        arguments = shared | kwargs
        required = [name for name in _component_names(cls, {}) if name not in cls._optional_components]
        if missing := [name for name in required if arguments.get(name) is None]:
            raise ValueError(f"{cls.__name__} requires {', '.join(missing)}, which {type(pipeline).__name__} lacks")
        built = cls(**arguments)
        return built if dtype is None else built.to(dtype=dtype)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write a folder that `from_pretrained` and `diffusers` load.

        It holds `model_index.json` and a folder per component; for a `DDIMPipeline` `scheduler/scheduler_config.json`,
        `unet/config.json` and weights as safetensors.

        Args:
            save_directory: created if it does not exist; files of the same names in it are replaced atomically.
            safe_serialization: `False` writes pickles (`.bin`) instead of safetensors.
            variant: part of the weights' name, such as `fp16`.
            max_shard_size: larger weights are split into files of at most this size: bytes, or `"500MB"`.
            push_to_hub: upload the files, too.
            options: of the upload (`ddim.io.hub.push_saved`): `repo_id`, `private`, `token`, `commit_message`,
                `create_pr`.

        Raises:
            OSError: if it cannot be written.
            TypeError: if a component cannot be saved.
            RuntimeError: if the hub cannot be reached or refuses.

        Example:
            >>> import tempfile
            >>> from ddim import DDIMPipeline
            >>> folder = tempfile.mkdtemp()
            >>> DDIMPipeline.from_pretrained("mnist").save_pretrained(folder)
            >>> sorted(path.name for path in Path(folder).iterdir())
            ['model_index.json', 'scheduler', 'unet']
        """
        names = [name for name in self._registered if name in _arguments(type(self))]
        components = {name: _unwrap(getattr(self, name)) for name in names}
        for name, module in components.items():
            if module is not None and not hasattr(module, "save_pretrained"):
                raise TypeError(f"{name} cannot be saved: {type(module).__name__} has no save_pretrained")
        settings = {
            "safe_serialization": safe_serialization,
            "variant": variant,
            "max_shard_size": max_shard_size or MAX_SHARD_SIZE,
        }

        def write(target: Path) -> None:
            for name, module in components.items():
                if module is not None:
                    accepted = inspect.signature(module.save_pretrained).parameters
                    module.save_pretrained(target / name, **{k: v for k, v in settings.items() if k in accepted})
            (target / self.config_name).write_text(self.to_json_string(), encoding="utf-8")

        networks = tuple(name for name, module in components.items() if isinstance(module, nn.Module))
        hub.save_and_push(write, Path(save_directory), push_to_hub, type(self).__name__, options, variant, networks)

    def _file_entries(self) -> dict[str, Any]:
        return {k: v for k, v in super()._file_entries().items() if k in _arguments(type(self))}

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string().rstrip()}"

    @classmethod
    def download(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Path:
        """Find the folder of a model, downloading it from the hub if necessary.

        Args:
            pretrained_model_name_or_path: the name of a built-in model, a folder, or a hub id.
            options: those of `ddim.io.hub.HubOptions`, `variant` and `use_safetensors`.

        Returns:
            The folder on this machine.

        Raises:
            FileNotFoundError: if no such model exists, or files are missing in it.

        Example:
            >>> from ddim import DDIMPipeline
            >>> DDIMPipeline.download("mnist").name
            'mnist'
        """
        hub_options = hub.pop_hub_options(options)
        variant, use_safetensors = options.pop("variant", None), options.pop("use_safetensors", None)
        passed = [name for name in _arguments(cls) if options.pop(name, None) is not None]
        _refuse_unknown(cls, options, "download")
        return hub.find_model(
            as_model(pretrained_model_name_or_path),
            hub_options,
            variant=variant,
            weights_in=() if "unet" in passed else ("unet", ""),
            use_safetensors=use_safetensors,
            folders=[name for name in _arguments(cls) if name not in ("unet", "scheduler", *passed)],
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        device_map: Any = None,
        **options: Any,
    ) -> Self:
        """Load a pipeline: a built-in model, a folder, or a hub id.

        Args:
            pretrained_model_name_or_path: `"mnist"`, `"mnist-labels"` or `"faces"`, which are built in; a folder of
                any layout that `ddim.io.hub` describes; or a hub id such as `"google/ddpm-cifar10-32"`.
            torch_dtype: of the networks; defaults to float32; `"auto"` for that of the files; a mapping of
                components, or `"default"`, to dtypes. `dtype` is another name.
            variant: of the weights, such as `fp16`.
            use_safetensors: `True` refuses pickled weights, `False` reads no others; by default safetensors come first.
            device_map: a device to put the networks on, or `"auto"`; defaults to the CPU.
            options: those of `ddim.io.hub.HubOptions`; components (`unet=...`) instead of what the folder holds;
                settings of the constructor; those in `ddim.io.pretrained.NO_EFFECT`, which do nothing, as does every
                option of other pipelines that is `None` or `False`, such as `safety_checker=None`.

        Returns:
            The pipeline, its networks in evaluation mode.

        Raises:
            FileNotFoundError: if no such model exists, or files are missing in it; names the files looked for.
            ValueError: if a file is damaged, does not fit, or names a class that is not allowed.
            TypeError: for another option.

        Example:
            >>> from ddim import DDIMPipeline
            >>> DDIMPipeline.from_pretrained("mnist", engine="eager").sample_shape
            (1, 28, 28)
        """
        model, variant = split_variant(pretrained_model_name_or_path, variant)
        dtype = options.pop("dtype", None) or torch_dtype
        for each in dtype.values() if isinstance(dtype, Mapping) else [dtype]:
            resolve_dtype(each)
        device = resolve_device_map(device_map)
        parameters = _arguments(cls)
        passed = {name: options.pop(name) for name in parameters if name in options}
        required = [k for k, parameter in parameters.items() if parameter.default is parameter.empty]
        passed = {k: v for k, v in passed.items() if v is not None or k not in required}
        hub_options = {name: options.pop(name) for name in hub.HUB_OPTION_NAMES if name in options}
        _refuse_unknown(cls, options, "from_pretrained")
        folder = cls.download(model, variant=variant, use_safetensors=use_safetensors, **hub_options, **passed)
        index = cls._check_index(folder)
        settings = {"torch_dtype": dtype, "variant": variant, "use_safetensors": use_safetensors}
        names = [name for name in _component_names(cls, index) if name not in passed]
        # Configurations are checked before weights, the long part, are read.
        names.sort(key=lambda name: "scheduler" not in name)
        loaded = {name: cls._load_component(folder, name, index.get(name), settings) for name in names}
        registered = {k: v for k, v in index.items() if k in parameters and k not in loaded and not names_class(v)}
        pipe = cls(**registered | loaded | passed)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipe if device is None else pipe.to(device)

    @classmethod
    def _check_index(cls, folder: Path) -> dict[str, Any]:
        """Return the content of a folder's `model_index.json`, `{}` where it has none, after checking its classes."""
        path = folder / hub.MODEL_INDEX
        return read_json(path) if path.exists() else {}

    @classmethod
    def _load_component(cls, folder: Path, name: str, entry: Any, settings: Mapping[str, Any]) -> Any:
        """Load a component from its folder.

        Args:
            folder: of the pipeline.
            name: of the component.
            entry: its library and class, as `model_index.json` has them; `None` if it names none.
            settings: `torch_dtype`, `variant` and `use_safetensors` for networks.
        """
        if entry is None or entry[1] is None:
            if name in cls._optional_components or entry is not None:
                return None
            raise ValueError(f"{folder / hub.MODEL_INDEX} names no {name}, which {cls.__name__} requires")
        settings = settings_of(name, settings)
        loader = find_class(entry[0], entry[1], f"{folder / hub.MODEL_INDEX}: {name}")
        given = {k: v for k, v in settings.items() if v is not None and isinstance(loader, type)}
        return loader.from_pretrained(folder / name, **(given if issubclass(loader, nn.Module) else {}))


def settings_of(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a component is loaded: the settings of all, with its own dtype.

    Args:
        name: of the component.
        settings: `torch_dtype`, which may be a mapping of components, or `default`, to dtypes; and others.

    Example:
        >>> settings_of("unet", {"torch_dtype": {"default": torch.float16}})
        {'torch_dtype': torch.float16}
    """
    dtype = settings.get("torch_dtype")
    return {**settings, "torch_dtype": dtype.get(name, dtype.get("default")) if isinstance(dtype, Mapping) else dtype}


def find_class(library: str, name: str, where: str) -> Any:
    """Return the class that a `model_index.json` names, without importing anything by a name from a file.

    Args:
        library: `diffusers`, `transformers`, or the module of a class of the program's own.
        name: of the class.
        where: where the names stand, for messages.

    Raises:
        ValueError: if no such class with `from_pretrained` exists.

    Example:
        >>> find_class("diffusers", "UNet2DModel", "here").__module__
        'ddim.unet'
    """
    if library in ("diffusers", "ddim") and name in OWN_CLASSES:
        return getattr(import_module("ddim"), name)
    if library in LIBRARIES:
        try:
            module = import_module(library)
        except ImportError:
            raise ValueError(f"{where} is a {name} of {library}, which is not installed") from None
    elif library in sys.modules:
        module = sys.modules[library]
    else:
        raise ValueError(f"{where} is a {name} of the module {shown(library)}; import it before loading")
    found = getattr(module, name, None) if isinstance(name, str) and not name.startswith("_") else None
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise ValueError(f"{where}: {library} has no class {shown(name)} with from_pretrained")
    return found


def _library_and_class(module: Any) -> tuple[str | None, str | None]:
    """Return what stands for a component in `model_index.json`."""
    if module is None:
        return None, None
    cls = type(_unwrap(module))
    library, *_ = cls.__module__.split(".")
    if library == "ddim" and cls.__name__ in OWN_CLASSES:
        return "diffusers", cls.__name__
    return library if library in LIBRARIES else cls.__module__, cls.__name__


def _unwrap(module: Any) -> Any:
    """Return the module behind one that `torch.compile` has made."""
    return getattr(module, "_orig_mod", module) if isinstance(module, nn.Module) else module


def _arguments(cls: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of a class's constructor."""
    return dict(list(inspect.signature(cls.__init__).parameters.items())[1:])  # type: ignore[misc]


def _component_names(cls: type[ComponentPipeline], named: Mapping[str, Any]) -> list[str]:
    """Return the arguments of a class's constructor that are components: those required, optional, or named."""
    components = {
        *cls._optional_components,
        *(k for k, v in named.items() if names_class(v)),
    }
    return [
        name
        for name, parameter in _arguments(cls).items()
        if name in components or (parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD)
    ]


def names_class(entry: Any) -> bool:
    """Return whether an entry of `model_index.json` is a component's: its library and class.

    Args:
        entry: the value; settings stand in the same file.

    Example:
        >>> names_class(["diffusers", "UNet2DModel"]), names_class([None, None]), names_class(0.5)
        (True, True, False)
    """
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str | None) for part in entry)


def _refuse_unknown(cls: type, options: dict[str, Any], function: str) -> None:
    """Refuse options that nothing takes."""
    for name in drop_unused_options(cls, options):
        known = [
            *_arguments(cls),
            *inspect.signature(ComponentPipeline.from_pretrained).parameters,
            *hub.HUB_OPTION_NAMES,
        ]
        raise TypeError(f"{function}() got an unexpected keyword argument {shown(name)}{nearest(name, known)}")
