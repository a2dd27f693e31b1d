"""`install()` runs unmodified scripts that are written for `diffusers` on the classes of this library.

    import ddim.compat
    ddim.compat.install()

    from diffusers import DDIMPipeline, DiffusionPipeline, UNet2DModel    # this library's, and so what it loads

Before that, the classes of the two libraries stand side by side. `diffusers` must be installed. Layers, blocks, results
and configurations are instances of its classes whether or not this is called (`ddim.io.diffusers_mixins`).
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import ddim

NAMES = ("UNet2DModel", "DDIMScheduler", "DDIMInverseScheduler", "DDIMPipeline")
"""The classes that `install` puts under their names in `diffusers`."""


def install() -> None:
    """Put the classes `NAMES` of this library under their names in `diffusers`, in this process.

    Every module of `diffusers` that is imported, now or later, has them; objects that exist keep their class, and so do
    names that the program itself has imported before. What `diffusers` loads by name, such as
    `DiffusionPipeline.from_pretrained(folder)`, is built of them.

    Raises:
        ModuleNotFoundError: if `diffusers` is not installed.

    Example:
        >>> install()  # doctest: +SKIP
        >>> import diffusers  # doctest: +SKIP
        >>> diffusers.UNet2DModel is ddim.UNet2DModel  # doctest: +SKIP
        True
    """
    diffusers: Any = import_module("diffusers")
    replaced = {id(getattr(diffusers, name)): getattr(ddim, name) for name in NAMES}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "diffusers":
            for attribute, value in list(vars(module).items()):
                if id(value) in replaced:
                    setattr(module, attribute, replaced[id(value)])
                elif isinstance(value, type):
                    # Pipelines compare the components that they are given with the constructor's annotations.
                    hints = getattr(vars(value).get("__init__"), "__annotations__", {})
                    hints.update({k: replaced[id(hint)] for k, hint in hints.items() if id(hint) in replaced})


def is_installed() -> bool:
    """Return whether `install` has been called.

    Example:
        >>> is_installed()
        False
    """
    diffusers = sys.modules.get("diffusers")
    return diffusers is not None and vars(diffusers).get("UNet2DModel") is ddim.UNet2DModel
