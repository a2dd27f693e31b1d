"""Which modules start-up loads."""

from __future__ import annotations

import subprocess
import sys


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_loads_no_heavy_module() -> None:
    loaded = modules_after("import ddim; ddim.DDIMPipeline, ddim.DDIMScheduler, ddim.UNet2DModel")
    heavy = {
        "gradio",
        "huggingface_hub",
        "datasets",
        "pydantic",
        "yaml",
        "typer",
        "rich",
        "matplotlib",
        "diffusers",
        "pandas",
    }
    assert "torch" in loaded
    assert not heavy & loaded


def test_help_is_printed_without_pytorch() -> None:
    script = (
        "import sys; sys.argv = ['ddim', '--help']\nfrom ddim.cli import main\ntry: main()\nexcept SystemExit: pass"
    )
    assert not {"torch", "numpy", "PIL"} & modules_after(script)


def test_missing_gradio_is_reported() -> None:
    script = (
        "import sys; sys.modules['gradio'] = None; sys.argv = ['ddim', 'app', '--no-open']\n"
        "from ddim.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "ddim: the page requires gradio; install it with: pip install 'ddim[app]'\n"
