"""The models that a page may open: those given at its start, the built-in ones, ids on the hub, and other folders only
where that was allowed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddim.app.inputs import said
from ddim.devices import choose_device
from ddim.info import describe
from ddim.io.hub import HUB_ID, builtin_models, find_model
from ddim.pipeline import DDIMPipeline
from ddim.validation import join_choices

MAX_OTHERS = 2
"""Models beside those given at the start that are kept in memory."""


class Models:
    """Opens models by name and keeps them.

    Args:
        given: names, folders or hub ids that are opened at once and kept; the first is the one a page begins with.
        allow_paths: whether any other folder of this machine may be opened too.
        device: where networks are put.
        engine: how they are run, as for `DDIMPipeline`.

    Raises:
        FileNotFoundError: if one given is no model.
        ValueError: if one is damaged, or there is no such device or engine.
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
        """Those given, then the other built-in ones."""
        return list(dict.fromkeys([*self._given, *builtin_models()]))

    def check(self, name: Any) -> str:
        """The name, if that model may be opened.

        Raises:
            ValueError: otherwise; nothing on the disk is looked at where only names are allowed.
        """
        if not isinstance(name, str) or not name or "\0" in name or len(name) > 4096:
            raise ValueError(f"model is {said(name)}; it must be {join_choices(self.names)}, or a hub id")
        if name in self.names or self.allow_paths:
            return name
        if HUB_ID.fullmatch(name) and not Path(name).exists():
            return name
        raise ValueError(
            f"model is {said(name)}; there are {', '.join(self.names)}, and hub ids such as google/ddpm-cifar10-32; "
            "other folders are opened where ddim app was started with --allow-paths"
        )

    def open(self, name: Any) -> DDIMPipeline:
        """The pipeline of that name, shared by all runs: its parts are used, its settings never changed.

        Raises:
            FileNotFoundError: if there is no such model.
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
        """What `ddim.info.describe` says of a model, less where it lies, and its `card`: the text of its README.md, or
        an empty one. Errors are those of `open`.
        """
        folder = find_model(self.check(name))
        facts = describe(folder) | {"model": name}
        del facts["found"]
        card = folder / "README.md"
        return facts | {"card": card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""}

    def _load(self, name: str) -> DDIMPipeline:
        return DDIMPipeline.from_pretrained(name, engine=self._engine).to(self._device)
