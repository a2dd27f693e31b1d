"""How kernels are compiled, kept and loaded, and what runs where they cannot be."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from numba import carray
from torch import nn

from ddim.io.cache import Cache
from ddim.kernels.compiler import compile_kernel
from ddim.kernels.machine import target_machine
from ddim.kernels.norm import FORWARD
from ddim.kernels.record import Count, Flag, Pointer, Real, Record
from ddim.kernels.runtime import Kernel
from ddim.nn.ops import load_kernels, norm_act
from helpers import randn
from kernel_helpers import channels_last, distance, gradients, make_norm
from programs import run_python

RUN_ONE_KERNEL = f"""
import sys, torch
import ddim.kernels
ddim.kernels.__path__.append({str(Path(__file__).parents[1] / "extra_kernels")!r})
from ddim.kernels.tiny import double
assert double(torch.ones(5)).tolist() == [2] * 5
print('numba' in sys.modules)
"""
LOAD_TRAINING_KERNELS = """
import sys
from ddim.kernels import shipped
shipped.find = lambda symbol: None
from ddim.nn.ops import load_kernels
assert load_kernels('norm') is not None
print('numba' in sys.modules)
"""
WITHOUT_OPENMP = """
import ctypes, torch
real = ctypes.CDLL
ctypes.CDLL = lambda name, *a, **k: real(name or 'libc.so.6', *a, **k)
torch.set_num_threads(2)
from ddim.kernels import runtime
assert runtime.openmp_library() is None
from ddim.kernels.norm import forward
x = torch.randn(3, 8, 4, 4).to(memory_format=torch.channels_last)
y, *_ = forward(x, torch.zeros(3, 8), torch.ones(8), torch.zeros(8), 2, 1e-5, False)
torch.testing.assert_close(y, torch.nn.functional.group_norm(x, 2))
"""
WITHOUT_NUMBA_AND_LLVMLITE = """
import sys, torch
sys.modules['numba'] = sys.modules['llvmlite'] = None
from ddim.kernels import shipped
shipped.find = lambda symbol: None
from ddim.engine import get_engine
from ddim.nn.ops import load_kernels
from ddim.unet import UNet2DModel
unet = UNet2DModel(sample_size=8, block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
assert load_kernels('norm') is None
print(get_engine(unet).name)
"""


def output(code: str, **variables: str) -> str:
    """What a program prints, in a process of its own."""
    done = run_python(code, env=os.environ | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_kernel(cache: Path) -> subprocess.CompletedProcess[str]:
    """A process that runs a kernel, and prints whether it had to compile it."""
    return run_python(RUN_ONE_KERNEL, env=os.environ | {"DDIM_KERNEL_CACHE": str(cache)})


def _object_code(folder: str, function: str, declarations: str = "", body: str = "") -> bytes:
    """Object code of a function with the name of a kernel."""
    symbol = Kernel(folder, function, []).symbol
    code = f"{declarations}\ndefine void @{symbol}(ptr %data) {{\n{body}\nret void\n}}"
    result: bytes = target_machine().emit_object(llvm.parse_assembly(code))
    return result


def compiles(cache: Path) -> bool:
    """Whether a process that runs a kernel has to compile it."""
    return output(RUN_ONE_KERNEL, DDIM_KERNEL_CACHE=str(cache)) == "True\n"


class TestFallbacks:
    def test_without_numba(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("DDIM_KERNEL_CACHE", str(tmp_path))
        monkeypatch.setattr(sys, "executable", "")  # other processes could compile
        for name in [name for name in sys.modules if name.startswith("ddim.kernels.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr("ddim.kernels.shipped.find", lambda symbol: None)
        monkeypatch.setitem(sys.modules, "numba", None)
        load_kernels.cache_clear()
        norm, x = make_norm(8, 2), channels_last(randn(2, 8, 4, 4)).requires_grad_()
        try:
            actual = gradients(lambda: norm_act(norm, nn.SiLU(), x), x, norm.weight)
            assert "_NormSiLU" not in str(norm_act(norm, nn.SiLU(), x).grad_fn)
            assert load_kernels("norm") is None
        finally:
            load_kernels.cache_clear()
        monkeypatch.undo()
        assert "_NormSiLU" in str(norm_act(norm, nn.SiLU(), x).grad_fn)
        assert distance(gradients(lambda: norm_act(norm, nn.SiLU(), x), x, norm.weight), actual) < 1e-5

    def test_without_numba_and_llvmlite(self) -> None:
        # An interpreter that has not imported them.
        done = subprocess.run([sys.executable, "-c", WITHOUT_NUMBA_AND_LLVMLITE], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "UNet2DModel\n"), done.stderr

    def test_without_openmp(self) -> None:
        """Where PyTorch's thread pool is not of GNU OpenMP, kernels run on the calling thread."""
        output(WITHOUT_OPENMP)


@pytest.fixture(scope="module")
def compiled_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one compiled kernel; tests copy it."""
    folder = tmp_path_factory.mktemp("kernels")
    assert compiles(folder)
    return folder


class TestCache:
    def test_several_are_compiled_by_other_processes(self, tmp_path: Path) -> None:
        """Those that are missing."""
        missing = {"norm.backward", "conv_grad.weight_gradient"}
        kept = {"norm.forward", "winograd.normalize_and_convolve"}
        cache = Cache("kernels", tmp_path)
        for name in kept:
            assert cache.write(FORWARD.entry.replace(FORWARD.name, name), [_object_code(*name.split("."))])
        before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.o")}
        assert output(LOAD_TRAINING_KERNELS, DDIM_KERNEL_CACHE=str(tmp_path)) == "False\n"
        assert {file.stem for file in tmp_path.rglob("*.o")} == kept | missing
        assert {file: file.stat().st_mtime_ns for file in before} == before

    def test_code_is_kept(self, tmp_path: Path) -> None:
        """Compiled once, loaded without numba afterwards; damaged code is not run."""
        assert compiles(tmp_path)
        assert not compiles(tmp_path)
        (file,) = tmp_path.rglob("tiny.double.o")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        assert compiles(tmp_path)
        assert not compiles(tmp_path)

    def test_unwritable_cache(self, tmp_path: Path) -> None:
        """A cache folder that cannot be made costs the compilation and nothing else."""
        (tmp_path / "file").touch()
        assert compiles(tmp_path / "file" / "kernels")

    @pytest.mark.parametrize("others", ["cache", "file"])
    def test_planted_code_is_not_run(self, compiled_cache: Path, tmp_path: Path, others: str) -> None:
        """Code that others could have put into the cache is compiled anew, in memory, with a warning."""
        cache = shutil.copytree(compiled_cache, tmp_path / "cache")
        (file,) = cache.rglob("tiny.double.o")
        entry = str(file.relative_to(cache))
        end_process = _object_code("tiny", "double", "declare void @_exit(i32)", "call void @_exit(i32 7)")
        assert Cache("kernels", cache).write(entry, [end_process])
        # It would have been run.
        assert run_kernel(cache).returncode == 7
        {"cache": cache, "file": file}[others].chmod(0o777)
        done = run_kernel(cache)
        assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
        assert "can be written by other users; delete it" in done.stderr

    @pytest.mark.parametrize("code", [b"words", "another function"])
    def test_entry_without_the_function(self, compiled_cache: Path, tmp_path: Path, code: bytes | str) -> None:
        """Whatever an entry holds, with the right checksum: it does not end the process."""
        shutil.copytree(compiled_cache, tmp_path, dirs_exist_ok=True)
        (file,) = tmp_path.rglob("tiny.double.o")
        content = code if isinstance(code, bytes) else _object_code("norm", "forward")
        assert Cache("kernels", tmp_path).write(str(file.relative_to(tmp_path)), [content])
        done = run_kernel(tmp_path)
        assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
        assert done.stderr.count("the cached kernels in") == 1

    def test_user_without_a_home_folder(self) -> None:
        no_home = "import pathlib\ndef home(): raise RuntimeError('no home')\npathlib.Path.home = home\n"
        assert output(no_home + RUN_ONE_KERNEL, DDIM_KERNEL_CACHE="", XDG_CACHE_HOME="") == "True\n"


class TestCompiler:
    def test_code_that_needs_numba_is_refused(self) -> None:
        """Nothing is called that exists only with numba: a kernel that could raise an error is refused."""

        def divide(data: Any) -> None:
            args = carray(data, 1)[0]
            if args.N == 0:
                raise ZeroDivisionError(str(args.N))

        with pytest.raises(RuntimeError, match="ddim_divide calls functions that need numba at run time"):
            compile_kernel(divide, Record([Count("N")]).dtype, "ddim_divide")


class TestRecord:
    RECORD = Record([Count("N"), Flag("silu"), Pointer("x"), Real("eps")])

    def test_bytes_are_those_of_the_dtype(self) -> None:
        x = torch.zeros(1)
        packed = self.RECORD.pack({"x": x, "eps": 0.5, "silu": True, "N": 7})
        assert np.frombuffer(packed, self.RECORD.dtype).item() == (7, 1, x.data_ptr(), 0.5)

    @pytest.mark.parametrize(
        ("name", "value", "error"),
        [("N", torch.zeros(1), TypeError), ("N", 0.5, struct.error), ("x", 3, AttributeError)],
    )
    def test_fields_refuse_other_kinds(self, name: str, value: Any, error: type[Exception]) -> None:
        values = {"N": 1, "silu": False, "x": torch.zeros(1), "eps": 0.5}
        with pytest.raises(error):
            self.RECORD.pack(values | {name: value})

    def test_missing_field(self) -> None:
        with pytest.raises(KeyError, match="eps"):
            self.RECORD.pack({"N": 1, "silu": False, "x": torch.zeros(1)})
