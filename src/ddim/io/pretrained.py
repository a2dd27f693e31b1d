"""`from_pretrained` and `save_pretrained` of schedulers and networks, with the arguments of `diffusers`.

A scheduler is a folder with `scheduler_config.json`, a network one with `config.json` and weights (`ddim.io.weights`).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from threading import get_ident
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ddim.devices import choose_device
from ddim.extras import check_xformers
from ddim.io.config import ConfigMixin
from ddim.io.hub import PushToHub, find_model, pop_hub_options, save_and_push
from ddim.io.json_files import read_json
from ddim.io.runs import as_model, split_variant
from ddim.io.weights import MAX_SHARD_SIZE, fill_model, read_weights, write_weights
from ddim.validation import shown

NO_EFFECT = (
    *("low_cpu_mem_usage", "max_memory", "offload_folder", "offload_state_dict", "disable_mmap"),
    *("proxies", "mirror", "user_agent", "model_cls"),
)
"""Arguments of `diffusers` that are accepted and do nothing: memory is used sparingly without them, and the hub client
takes proxies and mirrors from the environment."""


def drop_unused_options(cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a `from_pretrained` that are arguments of the class's constructor, or of nothing.

    Args:
        cls: the class.
        options: keyword arguments; those in `NO_EFFECT` are dropped, and those of other classes that are switched off,
            such as `safety_checker=None`.

    Example:
        >>> from ddim import DDIMScheduler
        >>> drop_unused_options(DDIMScheduler, {"low_cpu_mem_usage": True, "safety_checker": None, "sead": 1})
        {'sead': 1}
    """
    arguments = inspect.signature(cls).parameters
    return {k: v for k, v in options.items() if k in arguments or (k not in NO_EFFECT and v not in (None, False))}


def build_from_file(cls: Any, path: Path, **overrides: Any) -> Any:
    """Build an instance of a class with `from_config` from a configuration file.

    Args:
        cls: a class with `ConfigMixin`.
        path: the file.
        overrides: arguments of the constructor.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it does not describe an instance of the class.
        TypeError: for an override that the constructor does not accept.
    """
    content = read_json(path)
    try:
        return cls.from_config(content, **overrides)
    except Exception as error:  # given values of the wrong type, constructors raise errors of many kinds
        if overrides:
            raise
        raise ValueError(f"{path} does not describe a {cls.__name__}: {error}") from error


def resolve_dtype(dtype: Any, tensors: dict[str, Tensor] | None = None) -> torch.dtype:
    """Return the dtype that parameters get.

    Args:
        dtype: a floating dtype, `None` for the default dtype (float32), or `"auto"` for that of the weights.
        tensors: the weights; without them `"auto"` is only checked.

    Raises:
        ValueError: for anything else.

    Example:
        >>> resolve_dtype("auto", {"weight": torch.zeros(1, dtype=torch.float16)})
        torch.float16
    """
    if dtype == "auto":
        floating = (tensor.dtype for tensor in (tensors or {}).values() if tensor.is_floating_point())
        return next(floating, torch.float32)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"torch_dtype must be a floating dtype such as torch.bfloat16 or 'auto', got {shown(dtype)}")
    return dtype


def resolve_device_map(device_map: Any) -> torch.device | None:
    """Return the device that a `device_map` stands for; a network here is on one device as a whole.

    Args:
        device_map: a device, `{"": device}`, `"auto"` or `"balanced"` for the fastest; `None` for the CPU.

    Raises:
        ValueError: for anything else, or a device that the machine lacks.

    Example:
        >>> resolve_device_map({"": "cpu"})
        device(type='cpu')
    """
    if device_map is None:
        return None
    if isinstance(device_map, dict):
        if len(set(map(str, device_map.values()))) != 1:
            raise ValueError(f"device_map must name one device for the whole network, got {shown(device_map)}")
        device_map = next(iter(device_map.values()))
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        device_map = f"cuda:{device_map}"
    if not isinstance(device_map, str | torch.device):
        raise ValueError(f"device_map must be a device such as 'cuda:0', or 'auto', got {shown(device_map)}")
    automatic = ("auto", "balanced", "balanced_low_0", "sequential")
    return choose_device("auto" if device_map in automatic else device_map)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Put parameters that are made inside a `with` block on the meta device, where their initial values cost nothing.

    Buffers and other tensors are real, as no file may hold them. Modules that other threads make are left alone.

    Example:
        >>> with parameters_on_meta():
        ...     norm = nn.BatchNorm2d(1)
        >>> norm.weight.device.type, norm.running_mean.device.type
        ('meta', 'cpu')
    """
    thread = get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if get_ident() != thread or type(parameter) is not nn.Parameter or parameter.is_meta:
            return None  # the parameter itself, which other modules may share
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


class SchedulerFiles(ConfigMixin, PushToHub):
    """Mixin with `from_pretrained` and `save_pretrained` of a scheduler: a folder with `scheduler_config.json`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **options: Any,
    ) -> Self:
        """Build a scheduler from the configuration of any diffusion scheduler.

        Args:
            pretrained_model_name_or_path: the name of a built-in model, a folder, or a hub id such as
                `google/ddpm-cifar10-32`.
            subfolder: the folder inside it, usually `scheduler`.
            return_unused_kwargs: return the entries of the configuration that were not used, too.
            options: those of `ddim.io.hub.HubOptions`; those in `NO_EFFECT`, which do nothing, as does every option
                of other classes that is `None` or `False`; anything else overrides an argument of the constructor.

        Returns:
            The scheduler; or the scheduler and a dictionary of the unused entries.

        Raises:
            FileNotFoundError: if the model does not exist, or has no configuration.
            ValueError: if the configuration is not valid.
            TypeError: for an override that the constructor does not accept.

        Example:
            >>> from ddim import DDIMScheduler
            >>> DDIMScheduler.from_pretrained("mnist", "scheduler").config.num_train_timesteps
            1000
        """
        hub_options = pop_hub_options(options)
        overrides = drop_unused_options(cls, options)
        overrides |= {"return_unused_kwargs": True} if return_unused_kwargs else {}
        folder = find_model(as_model(pretrained_model_name_or_path), hub_options, weights_in=())
        return cast(Self, build_from_file(cls, folder / (subfolder or "") / cls.config_name, **overrides))

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **options: Any
    ) -> None:
        """Write `scheduler_config.json` into a folder.

        Args:
            save_directory: the folder; it is created if missing.
            push_to_hub: upload it, too.
            options: of the upload (`ddim.io.hub.push_saved`): `repo_id`, `private`, `token`, `commit_message`,
                `create_pr`.

        Raises:
            OSError: if it cannot be written.
            RuntimeError: if the hub cannot be reached or refuses.

        Example:
            >>> import tempfile
            >>> from ddim import DDIMScheduler
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     DDIMScheduler().save_pretrained(folder)
            ...     [path.name for path in Path(folder).iterdir()]
            ['scheduler_config.json']
        """
        self.save_config(save_directory, push_to_hub, **options)

    @property
    def compatibles(self) -> list[type[Any]]:
        """The scheduler classes that take this one's configuration: this one, and those of `diffusers` if installed."""
        try:
            diffusers: Any = import_module("diffusers")
        except ImportError:
            return [type(self)]
        names = [kind.name for kind in diffusers.schedulers.KarrasDiffusionSchedulers]
        others = [getattr(diffusers, name) for name in names if name != type(self).__name__]
        return [type(self), *others]


class ModelFiles(ConfigMixin, PushToHub):
    """Mixin with `from_pretrained` and `save_pretrained` of a network: a folder with `config.json` and weights."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **options: Any,
    ) -> Self:
        """Build a network in evaluation mode from its configuration and weights.

        Args:
            pretrained_model_name_or_path: the name of a built-in model, a folder, or a hub id such as
                `google/ddpm-cifar10-32`.
            subfolder: the folder inside it, usually `unet`.
            torch_dtype: a floating dtype for the parameters; defaults to float32, whatever the file holds; `"auto"` for
                that of the file. `dtype` is another name for it.
            variant: the variant of the weights, such as `fp16`.
            use_safetensors: `True` to read safetensors only, `False` for pickles only, `None` for either.
            output_loading_info: return what was not loaded, too.
            ignore_mismatched_sizes: keep initial weights where the file's have another shape.
            options: those of `ddim.io.hub.HubOptions`; `device_map`, the device to put the network on; those in
                `NO_EFFECT`, which do nothing, as does every option of other classes that is `None` or `False`; anything
                else overrides an argument of the constructor.

        Returns:
            The network; with `output_loading_info` a tuple of it and a dictionary with `missing_keys`,
            `unexpected_keys`, `mismatched_keys` (name, shape in the file, shape in the network) and `error_msgs`.

        Raises:
            FileNotFoundError: if the model does not exist, or has no configuration or weights.
            ValueError: if the configuration or the weights are damaged, or do not fit each other, or if `torch_dtype`
                is not a floating dtype.
            TypeError: for an override that the constructor does not accept.

        Example:
            >>> from ddim import UNet2DModel
            >>> UNet2DModel.from_pretrained("mnist", "unet").config.in_channels
            1
        """
        hub_options, dtype = pop_hub_options(options), options.pop("dtype", None) or torch_dtype
        resolve_dtype(dtype)
        device = resolve_device_map(options.pop("device_map", None))
        overrides = drop_unused_options(cls, options)
        model, variant = split_variant(pretrained_model_name_or_path, variant)
        subfolder = subfolder or ""
        root = find_model(model, hub_options, variant=variant, weights_in=(subfolder,), use_safetensors=use_safetensors)
        folder = root / subfolder
        # Initial weights would only be overwritten.
        on_meta = nullcontext() if ignore_mismatched_sizes else parameters_on_meta()
        with on_meta, torch.random.fork_rng(devices=()):
            network = build_from_file(cls, folder / cls.config_name, **overrides)
        tensors = read_weights(folder, variant, use_safetensors)
        mismatched = fill_model(network, tensors, str(folder), resolve_dtype(dtype, tensors), ignore_mismatched_sizes)
        network.register_to_config(_name_or_path=str(model))
        network = network.eval() if device is None else network.eval().to(device)
        if not output_loading_info:
            return cast(Self, network)
        info = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": mismatched, "error_msgs": []}
        return cast(Self, (network, info))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = MAX_SHARD_SIZE,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Write `config.json` and the weights as safetensors, replacing weights of the same variant.

        Args:
            save_directory: the folder; it is created if missing.
            is_main_process: `False` writes nothing: for all processes of a training run but one.
            save_function: has no effect: files are written atomically.
            safe_serialization: `False` writes a pickle (`.bin`) instead of safetensors.
            variant: part of the weight file's name, such as `fp16`.
            max_shard_size: the size above which weights are split into several files with an index, in bytes or as
                `"500MB"`.
            push_to_hub: upload the files, too.
            options: of the upload (`ddim.io.hub.push_saved`): `repo_id`, `private`, `token`, `commit_message`,
                `create_pr`.

        Raises:
            OSError: if it cannot be written; the folder is as it was.
            TypeError: for an option that the upload does not know, or that is given without `push_to_hub`.
            RuntimeError: if the hub cannot be reached or refuses.

        Example:
            >>> import tempfile
            >>> from ddim import UNet2DModel
            >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(32,), down_block_types=("DownBlock2D",),
            ...                    up_block_types=("UpBlock2D",))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     unet.save_pretrained(folder)
            ...     sorted(path.name for path in Path(folder).iterdir())
            ['config.json', 'diffusion_pytorch_model.safetensors']
        """
        if not isinstance(is_main_process, bool):
            raise TypeError(f"is_main_process must be True or False, got {shown(is_main_process)}")
        if not is_main_process:
            return

        def write(target: Path) -> None:
            (target / self.config_name).write_text(self.to_json_string(), encoding="utf-8")
            weights = cast(nn.Module, self).state_dict()
            write_weights(weights, target, variant, max_shard_size, safe_serialization)

        save_and_push(write, Path(save_directory), push_to_hub, type(self).__name__, options, variant, ("",))

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Do nothing: attention runs by PyTorch's fused operator, which is as fast.

        Args:
            attention_op: ignored.

        Raises:
            ModuleNotFoundError: if xformers is not installed, which scripts catch.
        """
        check_xformers()

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Do nothing: attention runs by PyTorch's fused operator."""
