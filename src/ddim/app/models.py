"""The models that a page may open.

They are those given at its start, the built-in ones, ids on the hub, and, where that was allowed, other folders.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddim.devices import choose_device
from ddim.info import describe
from ddim.io.hub import HUB_ID, builtin_models
from ddim.pipeline import DDIMPipeline
from ddim.validation import join_choices, shown

MAX_OTHERS = 2
"""Models kept in memory beside those given at the start."""

MAX_NAME_LENGTH = 4096


class ModelCache:
    """Opens models by name and keeps them in memory.

    Args:
        given: names, folders or hub ids, at least one; they are opened at once and kept, and a page starts with the
            first.
        allow_paths: whether any other folder of this machine may be opened too.
        device: where networks run, as `ddim.devices.choose_device` takes it.
        engine: how they run: `auto`, `eager` or `compile`.

    Raises:
        FileNotFoundError: if a name given is not a model.
        ValueError: if a model is damaged, or no such device or engine exists.
    """

    def __init__(
        self, given: Sequence[str], allow_paths: bool = False, device: str = "auto", engine: str = "auto"
    ) -> None:
        self.allow_paths = allow_paths
        self._device, self._engine = choose_device(device), engine
        self._lock = threading.Lock()
        self._given = {name: self._load(name) for name in given}
        self._others: OrderedDict[str, DDIMPipeline] = OrderedDict()

    @property
    def names(self) -> list[str]:
        """The models given, then the other built-in ones."""
        return list(dict.fromkeys([*self._given, *builtin_models()]))

    def check(self, name: Any) -> str:
        """Check that a model may be opened.

        Args:
            name: what a client sent.

        Returns:
            The name.

        Raises:
            ValueError: if it may not; nothing on the disk is looked up where only names are allowed.
        """
        allowed = join_choices([*self.names, "a hub id such as google/ddpm-cifar10-32"])
        if not isinstance(name, str) or not name or "\0" in name or len(name) > MAX_NAME_LENGTH:
            raise ValueError(f"model must be {allowed}, got {shown(name)}")
        if name in self.names or self.allow_paths:
            return name
        if HUB_ID.fullmatch(name) and not Path(name).exists():
            return name
        raise ValueError(
            f"model must be {allowed}, got {shown(name)}; other folders require a server started with allow_paths=True"
        )

    def open(self, name: Any) -> DDIMPipeline:
        """Return the pipeline of a model; all runs share it, and none changes it.

        Args:
            name: what a client sent.

        Returns:
            The pipeline.

        Raises:
            FileNotFoundError: if no such model exists.
            ValueError: if it may not be opened, or is damaged.
        """
        name = self.check(name)
        with self._lock:
            if name in self._given:
                return self._given[name]
            pipe = self._others.pop(name, None) or self._load(name)
            self._others[name] = pipe
            while len(self._others) > MAX_OTHERS:
                self._others.popitem(last=False)
            return pipe

    def facts(self, name: Any) -> dict[str, Any]:
        """Describe a model.

        Args:
            name: what a client sent.

        Returns:
            The entries of `ddim.info.describe` without the model's location, and `card`: the text of its README.md, or
            an empty one.

        Raises:
            FileNotFoundError: if no such model exists.
            ValueError: if it may not be opened, or is damaged.
        """
        facts = describe(self.check(name))
        card = Path(facts.pop("found"), "README.md")
        return facts | {"card": card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""}

    def _load(self, name: str) -> DDIMPipeline:
        return DDIMPipeline.from_pretrained(name, engine=self._engine).to(self._device)
