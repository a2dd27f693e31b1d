"""The compiled code that comes with the package: that of the sources, for all levels, and used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ship_kernels
from ddim.kernels import machine, shipped
from ddim.kernels.machine import LEVELS, choose_level, read_flags
from programs import run_python

ALL_FLAGS = {name for names in LEVELS.values() for name in names}
RUN_WITHOUT_COMPILER = """
import sys
sys.modules["numba"] = sys.modules["llvmlite"] = None
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
    assert shipped.are_current(), "the kernels have changed: run scripts/ship_kernels.py"
    assert set(shipped.FOLDER.glob("*.so")) == {shipped.path_of(level) for level in LEVELS}
    hashes = json.loads(shipped.VERSIONS.read_text())["objects_sha256"]
    assert hashes.keys() == {f"{level}-{name}" for level in LEVELS for name in ship_kernels.KERNELS}


@pytest.mark.parametrize("level", LEVELS)
def test_compiling_gives_the_same_bytes(level: str, tmp_path: Path) -> None:
    versions = json.loads(shipped.VERSIONS.read_text())
    if {name: versions[name] for name in ship_kernels.COMPILER} != ship_kernels.describe_compiler():
        pytest.skip("another compiler")
    compiled = ship_kernels.compile_in_process("direct.convolve", level, tmp_path)
    assert ship_kernels.sha256(compiled) == versions["objects_sha256"][compiled.stem]


@pytest.mark.skipif(machine.LEVEL is None, reason="requires Linux and a processor with AVX2")
@pytest.mark.parametrize("level", LEVELS)
def test_networks_run_on_it_without_a_compiler(level: str, tmp_path: Path) -> None:
    if list(LEVELS).index(level) < list(LEVELS).index(str(machine.LEVEL)):
        pytest.skip("a level above this processor's")
    variables = {machine.LEVEL_VARIABLE: level, "DDIM_KERNEL_CACHE": str(tmp_path)}
    done = run_python(RUN_WITHOUT_COMPILER, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    used, engine, error = done.stdout.split()
    assert (used, engine) == (level, "CPUEngine")
    assert float(error) < 1e-5
    assert not list(tmp_path.rglob("*.o"))


@pytest.mark.parametrize("change", ["sources", "level", "library"])
def test_kernels_that_do_not_come_along_are_not_found(
    change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if change == "sources":
        monkeypatch.setattr(shipped, "are_current", lambda: False)
    elif change == "level":
        monkeypatch.setattr(shipped, "LEVEL", None)
    else:
        (tmp_path / "library.so").write_bytes(b"not a library")
        monkeypatch.setattr(shipped, "path_of", lambda level: tmp_path / "library.so")
    shipped._library.cache_clear()
    try:
        assert shipped.find("ddim_norm_forward") is None
    finally:
        shipped._library.cache_clear()


def test_flags(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t\t: fpu avx2 fma\nbugs : x\n\nflags : other\n")
    assert read_flags(tmp_path / "cpuinfo") == {"fpu", "avx2", "fma"}
    assert read_flags(tmp_path / "missing") == set()


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
    assert choose_level(system, ALL_FLAGS.difference(missing), given) == expected


def test_unknown_level() -> None:
    with pytest.raises(ValueError, match="DDIM_KERNEL_LEVEL must be one of x86-64-v4, x86-64-v3, got 'avx'"):
        choose_level("linux", ALL_FLAGS, "avx")
    command = [sys.executable, "-c", "import ddim.kernels.machine"]
    done = subprocess.run(command, env=os.environ | {machine.LEVEL_VARIABLE: "avx"}, capture_output=True, text=True)
    assert "DDIM_KERNEL_LEVEL must be one of" in done.stderr
