"""Latent-code files: damaged ones, and whole ones of other writers with any array and any settings.

What is loaded from a damaged file of this library must be what was saved; from another writer's, the stored array.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from ddim.io.latent_files import LatentSettings, load_latents, save_latents
from fuzz.harness import attempt, empty, expect
from fuzz.mutations import MUTATIONS, VALUES, Mutation, make_zip, mutate, zip_bomb

SETTINGS = LatentSettings("mnist", "0" * 64, [900, 450, 0], True, 1e-5, [2e-6, 1e-7])
KEYS = ("model", "model_sha256", "timesteps", "exact", "tolerance", "residual")
DTYPES = ("<f4", ">f4", "<f2", "<f8", ">f8", "u1", "<i8", "?", "<c8", "U3", "S2", "M8[s]", "O", "V4")


class Latents(NamedTuple):
    """A latent-code file.

    Attributes:
        suffix: of its name.
        mutations: damage to a file that this library wrote.
        dtype: of another writer's array; empty for a file that this library wrote.
        shape: of that array.
        is_finite: whether it is without NaN and infinity.
        settings: entries of its settings, `None` for the valid one.
        text: all settings instead.
        is_compressed: whether the archive is.
        resaved: entries of the settings that replace those of a file of this library, whose checksum stays.
    """

    suffix: str
    mutations: list[Mutation] = []  # noqa: RUF012 - a default of a named tuple, never changed
    dtype: str = ""
    shape: tuple[int, ...] = (2, 1, 4, 4)
    is_finite: bool = True
    settings: dict[str, Any] = {}  # noqa: RUF012
    text: str | None = None
    is_compressed: bool = False
    resaved: dict[str, Any] = {}  # noqa: RUF012


SUFFIX = st.sampled_from([".npz", ".safetensors", ".NPZ"])
ENTRIES = st.dictionaries(
    st.sampled_from([*KEYS, "sha256", "format_version", "x"]), VALUES | st.just([5, 3]) | st.just("m"), max_size=2
)
EXAMPLES = st.one_of(
    st.builds(lambda suffix, mutations: Latents(suffix, mutations), SUFFIX, MUTATIONS),
    st.builds(lambda suffix, mutations: Latents(suffix, mutations), SUFFIX, MUTATIONS),
    st.builds(lambda suffix, entries: Latents(suffix, resaved=entries), SUFFIX, ENTRIES),
    st.builds(
        lambda suffix, dtype, shape, is_finite, entries, text, is_compressed: Latents(
            suffix, [], dtype, tuple(shape), is_finite, entries, text, is_compressed
        ),
        SUFFIX,
        st.sampled_from(DTYPES) | st.just("<f4"),
        st.sampled_from([(2, 1, 4, 4), (1, 3, 2, 2), (0, 1, 4, 4), (4,), (), (1, 1, 4), (20_000, 1, 64, 64)])
        | st.lists(st.integers(0, 3), max_size=6),
        st.booleans(),
        ENTRIES,
        st.sampled_from([None] * 6 + ["", "{", "null", "[]", "3", "NaN", "[" * 2000, '{"model": 1}', "\x00"]),
        st.booleans(),
    ),
)


def make_check(folder: Path) -> Callable[[Latents], None]:
    """Return the check of a latent-code file."""
    stored = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    folder.mkdir(exist_ok=True)
    written = {
        suffix: save_latents(folder / f"x{suffix}", stored, SETTINGS).read_bytes()
        for suffix in (".npz", ".safetensors")
    }

    def check(example: Latents) -> None:
        path = empty(folder / "latents") / f"x{example.suffix}"
        if example.dtype:
            array = make_array(example)
            entries = {
                name: value for name, value in (asdict(SETTINGS) | example.settings).items() if value is not None
            }
            text = json.dumps(entries) if example.text is None else example.text
            if not write_foreign(path, array, text, example.is_compressed):
                return
        else:
            data = written[example.suffix.lower()]
            path.write_bytes(mutate(data, example.mutations))
            if example.resaved:
                resave(path, example.resaved)
        latents, settings = attempt(load_latents, path, naming=(str(path),))
        expect(latents.dtype == torch.float32 and bool(latents.isfinite().all()), f"{latents.dtype}, or not finite")
        if example.dtype:
            expected = torch.from_numpy(array.astype(np.float32))
            expect(torch.equal(latents, expected), "other latents than those in the file")
            for name in KEYS:
                expect(getattr(settings, name) == entries[name], f"{name} is not that in the file")
        else:
            expect(torch.equal(latents, stored), "a damaged file gives other latents")
            expect(settings == SETTINGS, "a damaged file gives other settings")
        again = save_latents(path.with_name("again.npz"), latents, settings)
        expect(torch.equal(load_latents(again)[0], latents), "other latents when they are saved")

    return check


def make_array(example: Latents) -> np.ndarray:
    """Return the array of another writer."""
    if np.prod(example.shape) > 1e6:
        return np.zeros(example.shape if example.is_compressed else (900, 1, 64, 64), np.float32)
    values = np.random.default_rng(0).normal(size=example.shape)
    if not example.is_finite and values.size:
        values.flat[0] = np.nan
    if example.dtype == "O":
        return np.array([{"x": 1}, None], object)
    if example.dtype in ("U3", "S2", "M8[s]", "V4"):
        return np.zeros(example.shape, example.dtype)
    with np.errstate(all="ignore"):
        return values.astype(example.dtype)


def write_foreign(path: Path, array: np.ndarray, text: str, is_compressed: bool) -> bool:
    """Write a file without a checksum, and return whether its format can hold the array."""
    if path.suffix.lower() == ".npz":
        if array.nbytes > 1e8:
            header = io.BytesIO()
            np.lib.format.write_array(header, array[:0])
            prefix = header.getvalue().replace(b"(0, 1, 64, 64), }     ", b"(196608, 1, 64, 64), }")
            settings = io.BytesIO()
            np.save(settings, np.array(text))
            path.write_bytes(
                make_zip([("latents.npy", *zip_bomb(prefix)), ("settings.npy", settings.getvalue(), None)])
            )
            return True
        with path.open("wb") as file:
            (np.savez_compressed if is_compressed else np.savez)(file, latents=array, settings=np.array(text))
        return True
    if array.nbytes > 1e8:
        return False
    try:
        tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        save_file({"latents": tensor}, path, metadata={"settings": text})
    except (TypeError, RuntimeError, KeyError):
        return False
    return True


def resave(path: Path, entries: dict[str, Any]) -> None:
    """Change entries of the settings in a file of this library, by a writer that knows no checksum."""
    if path.suffix.lower() == ".npz":
        with np.load(path) as file:
            settings, latents = json.loads(str(file["settings"])), file["latents"]
        with path.open("wb") as target:
            np.savez(target, latents=latents, settings=np.array(json.dumps(settings | entries)))
        return
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        settings, latents = json.loads(file.metadata()["settings"]), file.get_tensor("latents").clone()
    save_file({"latents": latents}, path, metadata={"settings": json.dumps(settings | entries)})
