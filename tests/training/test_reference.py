"""The reference of all entries: commented YAML that loads as what it shows, and the table in the docs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ddim.scheduler import DDIMScheduler
from ddim.training.config import TrainConfig, entry_names, load_config, preset_names, read_preset, validate
from ddim.training.reference import commented_yaml, entries_table, list_entries
from ddim.unet import UNet2DModel
from helpers import public

DOCS = Path(__file__).parents[2] / "docs" / "training-configuration.md"
DATA = {"data": {"source": "digits"}}


def uncommented(text: str) -> dict[str, Any]:
    """Parse commented YAML with all entries that are commented out."""
    tree: dict[str, Any] = yaml.safe_load(re.sub(r"^( *)#(?! )", r"\1", text, flags=re.MULTILINE))
    return tree


def leaves(tree: Any, prefix: str = "") -> set[str]:
    """Return the dotted names of all values."""
    if not isinstance(tree, dict):
        return {prefix}
    return set().union(*(leaves(value, f"{prefix}.{name}" if prefix else name) for name, value in tree.items()))


@pytest.mark.parametrize("name", preset_names())
def test_presets_round_trip(name: str) -> None:
    preset = read_preset(name)
    text = commented_yaml(preset)
    assert yaml.safe_load(text) == preset
    assert all(len(line) <= 100 for line in text.splitlines() if re.match(r" *# ", line))


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_uncommented_defaults_are_the_defaults() -> None:
    """By building a configuration and both components from them and without them."""
    tree = uncommented(commented_yaml({}))
    size = {"model": {"sample_size": 32}}
    assert validate({**tree, **DATA, **size, "scheduler": {}}) == validate({**DATA, **size})
    assert public(DDIMScheduler(**tree["scheduler"]).config) == public(DDIMScheduler(clip_sample=False).config)
    with torch.device("meta"):
        shown, default = (UNet2DModel(**arguments).config for arguments in (tree["model"], {}))
    assert {name: _as_list(value) for name, value in public(default).items()} == public(shown)


def test_every_entry_is_there_and_described() -> None:
    entries = list(list_entries())
    names = {entry.name for entry in entries}
    assert names >= set(entry_names(TrainConfig))
    assert len(names) == len(entries)
    assert all(len(entry.description) > 5 and not entry.description.endswith("\n") for entry in entries)
    assert leaves(uncommented(commented_yaml({}))) == {entry.name for entry in entries if not entry.is_section}


def test_printed_configuration_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(commented_yaml(read_preset("mnist")))
    assert load_config(config_file=file) == load_config("mnist")


def test_values_survive_whatever_they_are(tmp_path: Path) -> None:
    tree = {
        "data": {"source": "a: #b\n'c'", "column": None},
        "optim": {"lr": 1e-7, "betas": [0.1, 0.2]},
        "model": {"block_out_channels": [8] * 60},
        "scheduler": {},
    }
    read = yaml.safe_load(commented_yaml(tree))
    assert read == {name: value for name, value in tree.items() if value}


def test_documented_table_is_generated() -> None:
    text = DOCS.read_text()
    _, table = text.split("<!-- entries: scripts/configuration_table.py -->\n")
    assert table.strip() == entries_table(), "run python scripts/configuration_table.py"
