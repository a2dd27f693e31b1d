"""Inputs that once had a fault: what the campaign found, one per kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fuzz.archives import Archive
from fuzz.checkpoints import Damage
from fuzz.configurations import BOMB, Configuration
from fuzz.harness import ACCEPTED, REFUSED, judge, prepared
from fuzz.images import Picture
from fuzz.latents import Latents
from fuzz.mutations import Mutation

DELETE_BEFORE_THE_END = [Mutation("delete", -132, 1, b"")]
FLIP_IN_THE_MIDDLE = [Mutation("flip", 30_000, 3, b"")]

CASES: dict[str, tuple[str, Any, str]] = {
    # PIL maps uncompressed TIFFs into memory by the wrong height and width.
    "turned TIFF": ("images", Picture("TIFF", "L", (6, 7), orientation=6), ""),
    "turned TIFF with alpha": ("images", Picture("TIFF", "RGBA", (6, 7), orientation=8), ""),
    "turned TIFF of 16 bits": ("images", Picture("TIFF", "I;16", (6, 7), orientation=5), ""),
    # Messages of PIL about its own code.
    "number in an image's header": (
        "images",
        Picture("PPM", "1", (5, 1), mutations=[Mutation("set", 3, 0, b"P4")]),
        "x.png cannot be read: it is damaged",
    ),
    "offset in an image's header": (
        "images",
        Picture("TIFF", "CMYK", (3, 3), orientation=2, mutations=[Mutation("flip", 2, 0, b"")]),
        "x.png cannot be read: it is damaged",
    ),
    # Opening a pipe waits for a writer.
    "pipe as weights": ("checkpoints", Damage("safetensors", file="fifo"), "is not a regular file"),
    "pipe as a pickle": ("checkpoints", Damage("bin", file="fifo"), "is not a regular file"),
    # PyTorch does not verify the checksums in its files.
    "flipped bit in a pickle": ("checkpoints", Damage("bin", FLIP_IN_THE_MIDDLE), "does not match the checksums in it"),
    "flipped bit in a shard": (
        "checkpoints",
        Damage("bin shards", [Mutation("set", 3000, 0, b"U" * 200)]),
        "checksums",
    ),
    "flipped bit in a checkpoint": (
        "checkpoints",
        Damage("ddpm.pt", FLIP_IN_THE_MIDDLE),
        "does not match the checksums",
    ),
    # The reader of safetensors quotes what it cannot parse.
    "long shape in a header": (
        "checkpoints",
        Damage("safetensors", index={"shape": "x" * 3000}),
        "is truncated or damaged: Error while deserializing header",
    ),
    # Its message is about the size of its buffer.
    "impossible shape in a header": (
        "checkpoints",
        Damage("openai.safetensors", index={"file": [15, 267], "shape": [15, 49728394974, 49728394974, 553]}),
        "openai.safetensors is truncated or damaged: it claims more than it can hold",
    ),
    "schedule that underflows": (
        "configurations",
        Configuration("scheduler", {"rescale_betas_zero_snr": True, "beta_end": 0.999}),
        "",
    ),
    "compressed pickle": ("checkpoints", Damage("bin", file="zip bomb"), "its members take 3221"),
    # Tensors that no network has.
    "number as a name": (
        "checkpoints",
        Damage("bin", changes=[("rename", 3)]),
        "all of them dense and named",
    ),
    "sparse tensor": (
        "checkpoints",
        Damage("bin", changes=[("sparse", 4)]),
        "all of them dense and named",
    ),
    "sparse tensor to convert": (
        "checkpoints",
        Damage("ddpm.pt", changes=[("sparse", 4)]),
        "a dictionary of tensors, dense and named",
    ),
    "complex tensor": ("checkpoints", Damage("bin", changes=[("complex", 4)]), "must be real, got torch.complex64"),
    # Entries of configurations.
    "another encoding": (
        "configurations",
        Configuration("unet", mutations=[Mutation("set", 9, 0, b"\xff")]),
        "is not valid JSON: it is not UTF-8 text",
    ),
    "defaults that are no list": (
        "configurations",
        Configuration("unet", {"_use_default_values": 3}),
        "must be a list of names",
    ),
    "weights of integers": ("checkpoints", Damage("bin shards", [], [("integer", 28)], "", {}), ""),
    "weights that are true or false": ("checkpoints", Damage("shards", [], [("bool", 6), ("view", 3)], "", {}), ""),
    "an entry self": ("configurations", Configuration("scheduler", {"self": None}), ""),
    "an entry self of a pipeline": ("configurations", Configuration("index", {"self": None}), ""),
    "an entry engine of a pipeline": ("configurations", Configuration("index", {"engine": 1}), ""),
    "betas that are text": (
        "configurations",
        Configuration("scheduler", {"trained_betas": "x"}),
        "must be a list of numbers",
    ),
    "betas of a training run": (
        "configurations",
        Configuration("training", {"scheduler": {"trained_betas": "x"}}),
        "training configuration, scheduler: trained_betas must be a list of numbers",
    ),
    # YAML.
    "aliases of aliases": (
        "configurations",
        Configuration("training", text=BOMB + "model: *j"),
        "a tree of at most 100000 values",
    ),
    "an alias of itself": (
        "configurations",
        Configuration("training", text="data: &a [*a]"),
        "a tree of at most 100000 values",
    ),
    "a day that does not exist": (
        "configurations",
        Configuration("training", text="x: 2001-99-99"),
        "a value that cannot be read",
    ),
    "thousands of digits": (
        "configurations",
        Configuration("training", text="seed: " + "9" * 6000),
        "a value that cannot be read",
    ),
    # Messages of readers about their own code, or as long as the file.
    "nested settings": (
        "latents",
        Latents(".npz", dtype="<f4", text="[" * 5000),
        "x.npz is damaged or not a latent file: it is damaged",
    ),
    "impossible position": (
        "latents",
        Latents(".npz", [Mutation("delete", -235, 5, b"")]),
        "not a latent file: it is damaged",
    ),
    "impossible position of images": ("archives", Archive("packed npz", "", DELETE_BEFORE_THE_END), "it is damaged"),
    "damaged deflate stream": (
        "archives",
        Archive("packed npz", "", [Mutation("set", -97, 1, b"\x07\x86")]),
        "cannot be read as .npz: it is damaged",
    ),
    # `tarfile` of Python finds such a member again for ever.
    "negative size": ("archives", Archive("tar", "negative shape"), "must have a size of at least 0, got -512"),
    "header as long as the file": (
        "archives",
        Archive("npz", "", [Mutation("set", 25, 244, b"\xff" * 8)]),
        "cannot be read as .npz: File name in directory",
    ),
    # `RowGroupMetaData.column` of pyarrow ends the process.
    "sizes of a list in a parquet file without lists": (
        "archives",
        Archive(
            "parquet", "", [Mutation("delete", 43479, 2, bytes(8)), Mutation("flip", 112, 347, b"\xc3\xec\xe8\xc8ce")]
        ),
        "cannot be read as parquet: Repetition level histogram size mismatch",
    ),
}


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Callable[[Any], None]]]:
    """Return the check of a target, which is prepared once."""
    checks: dict[str, Callable[[Any], None]] = {}
    with ExitStack() as stack:

        def get(target: str) -> Callable[[Any], None]:
            if target not in checks:
                checks[target] = stack.enter_context(prepared(target, tmp_path_factory.mktemp(target)))
            return checks[target]

        yield get


@pytest.mark.parametrize("name", CASES)
def test_mended(name: str, check: Callable[[str], Callable[[Any], None]]) -> None:
    """What is expected is part of a refusal; empty, the input is accepted, and all comparisons of its target hold."""
    target, example, expected = CASES[name]
    verdict, detail = judge(check(target), example)
    assert verdict == (REFUSED if expected else ACCEPTED), detail
    assert expected in detail


def test_pipe_as_a_configuration(tmp_path: Path) -> None:
    import os

    from ddim.training.config import load_config

    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(FileNotFoundError, match="cannot be read: it is not a regular file"):
        load_config(config_file=tmp_path / "config.yaml")
