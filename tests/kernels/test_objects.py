"""The object code that comes with the package: that of the sources, for all levels, and used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ship_kernels
from ddim.kernels import machine, objects
from ddim.kernels.machine import LEVELS, choose_level
from programs import run_python

ALL_FEATURES = {name: True for names in LEVELS.values() for name in names}
RUN_WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
import torch
from ddim.engine import get_engine
from ddim.kernels import machine
from ddim.unet import UNet2DModel
torch.manual_seed(0)
unet = UNet2DModel(sample_size=16, block_out_channels=(32, 32, 32, 32), layers_per_block=1).eval()
x = torch.randn(2, 3, 16, 16)
with torch.no_grad():
    expected, actual = unet(x, 500).sample, get_engine(unet).predict(x, 500)
print(machine.LEVEL, get_engine(unet).name, float((actual - expected).norm() / expected.norm()))
"""


def test_code_is_that_of_the_sources() -> None:
    assert objects.are_current(), "the kernels have changed: run scripts/ship_kernels.py"
    files = {path.relative_to(objects.FOLDER).as_posix() for path in objects.FOLDER.rglob("*.o")}
    assert files == {f"{level}/{name}.o" for level in LEVELS for name in ship_kernels.KERNELS}


@pytest.mark.parametrize("level", LEVELS)
def test_compiling_gives_the_same_bytes(level: str, tmp_path: Path) -> None:
    versions = json.loads(objects.VERSIONS.read_text())
    if {name: versions[name] for name in ship_kernels.COMPILER} != ship_kernels.describe_compiler():
        pytest.skip("another compiler")
    name = "direct.convolve"
    compiled = ship_kernels.compile_in_process(name, level, tmp_path)
    assert compiled.read_bytes() == objects.path_of(name, level).read_bytes()


@pytest.mark.skipif(machine.LEVEL is None, reason="requires Linux and a processor with AVX2")
@pytest.mark.parametrize("level", LEVELS)
def test_networks_run_on_it_without_a_compiler(level: str, tmp_path: Path) -> None:
    if list(LEVELS).index(level) < list(LEVELS).index(str(machine.LEVEL)):
        pytest.skip("a level above this processor's")
    variables = {machine.LEVEL_VARIABLE: level, "DDIM_KERNEL_CACHE": str(tmp_path)}
    done = run_python(RUN_WITHOUT_NUMBA, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    used, engine, error = done.stdout.split()
    assert (used, engine) == (level, "CPUEngine")
    assert float(error) < 1e-5
    assert not list(tmp_path.rglob("*.o"))


def test_changed_sources_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "are_current", lambda: False)
    assert objects.read("norm.forward") is None


@pytest.mark.parametrize(
    ("system", "missing", "given", "expected"),
    [
        ("linux", (), None, "x86-64-v4"),
        ("linux", ("avx512bw",), None, "x86-64-v3"),
        ("linux", ("fma",), None, None),
        ("linux", (), "x86-64-v3", "x86-64-v3"),
        ("darwin", (), None, None),
        ("win32", (), "x86-64-v3", None),
    ],
)
def test_levels(system: str, missing: tuple[str, ...], given: str | None, expected: str | None) -> None:
    features = {name: name not in missing for name in ALL_FEATURES}
    assert choose_level(system, features, given) == expected


def test_unknown_level() -> None:
    with pytest.raises(ValueError, match="DDIM_KERNEL_LEVEL must be one of x86-64-v4, x86-64-v3, got 'avx'"):
        choose_level("linux", ALL_FEATURES, "avx")
    command = [sys.executable, "-c", "import ddim.kernels.machine"]
    done = subprocess.run(command, env=os.environ | {machine.LEVEL_VARIABLE: "avx"}, capture_output=True, text=True)
    assert "DDIM_KERNEL_LEVEL must be one of" in done.stderr
