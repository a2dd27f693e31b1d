"""Build the static page that samples in the visitor's browser: docs/browser, the models, and onnxruntime-web.

    python scripts/browser_page.py --out site
    python -m http.server --directory site 8000

The page needs no server beside one for its files. Models are exported with their loops of `--steps` steps; the runtime
is fetched by npm, or taken from the folder of the package that `--runtime` names.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from ddim import DDIMPipeline
from ddim.diffusion.sampling_config import SamplingConfig
from ddim.export import export_onnx

ROOT = Path(__file__).parents[1]
RUNTIME = "onnxruntime-web@1.27.0"
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def build(out: Path, models: list[str], config: SamplingConfig, runtime: Path) -> None:
    """Write the page's files into a folder.

    Args:
        out: the folder; it is created.
        models: names of models, the first of which the page shows first.
        config: settings of their loops.
        runtime: folder of the npm package.
    """
    (out / "ort").mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "docs" / "browser").iterdir()):
        shutil.copy(path, out)
    for name in RUNTIME_FILES:
        shutil.copy(runtime / "dist" / name, out / "ort")
    entries = [export_model(out, model, config) for model in models]
    (out / "models.json").write_text(json.dumps(entries, indent=2) + "\n")


def export_model(out: Path, model: str, config: SamplingConfig) -> dict[str, Any]:
    """Export a model's loop, with weights in half precision, and return its entry in models.json."""
    pipe = DDIMPipeline.from_pretrained(model).to(torch.float16)
    name = Path(model).name
    export_onnx(pipe, out / f"{name}.onnx", config, overwrite=True)
    classes, labels = pipe.classes, []
    if classes is not None:
        labels = [{"name": classes.name_of(label), "label": label} for label in range(classes.count)]
        labels += [{"name": "any", "label": classes.count}] if classes.has_null else []
    shape, steps = list(pipe.sample_shape), len(pipe.scheduler.timesteps)
    return {"name": name, "file": f"{name}.onnx", "shape": shape, "steps": steps, "labels": labels}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["mnist", "faces"])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--order", type=int, default=1)
    parser.add_argument("--runtime", type=Path, help="folder of the package onnxruntime-web; fetched by npm without it")
    arguments = parser.parse_args()
    config = SamplingConfig(arguments.steps, order=arguments.order)
    with tempfile.TemporaryDirectory() as folder:
        runtime = arguments.runtime
        if runtime is None:
            command = ["npm", "install", "--prefix", folder, "--no-audit", "--no-fund", "--ignore-scripts", RUNTIME]
            subprocess.run(command, check=True)
            runtime = Path(folder) / "node_modules" / RUNTIME.partition("@")[0]
        build(arguments.out, arguments.models, config, runtime)
    print(arguments.out)


if __name__ == "__main__":
    main()
