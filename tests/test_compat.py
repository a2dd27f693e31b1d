"""`ddim.compat`: unmodified scripts written for `diffusers` run on the classes of this library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddim import DDIMPipeline
from programs import run_python

IMPORTS = {
    "not installed": "",
    "installed first": "import ddim.compat; ddim.compat.install()",
    "installed last": "import diffusers; from diffusers import DDPMPipeline, DDIMPipeline\n"
    "import ddim.compat; ddim.compat.install()",
}


def run(script: str, *arguments: str | Path, fresh: bool = False, is_silent: bool = True) -> Any:
    """Run a script in a process of its own and return what it prints last, as JSON.

    A fresh process has imported nothing; others have imported this library, and `diffusers` not yet. A silent one has
    not been warned of classes that `diffusers` does not know.
    """
    if fresh:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    else:
        result = run_python(script, *arguments)
    assert result.returncode == 0, result.stderr
    assert is_silent is ("Expected types" not in result.stderr + result.stdout)
    return json.loads(result.stdout.splitlines()[-1])


SCRIPT = """
import json, sys, warnings
import torch
warnings.simplefilter("error", FutureWarning)
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DiffusionPipeline, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DModel as Same
from diffusers.schedulers import DDIMScheduler as Also

assert UNet2DModel is Same and DDIMScheduler is Also
results = []
for source, target in zip(sys.argv[1::2], sys.argv[2::2]):
    pipe = DiffusionPipeline.from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, DDIMPipeline) and isinstance(pipe.unet, UNet2DModel)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    generator = torch.Generator().manual_seed(0)
    images = pipe(batch_size=2, num_inference_steps=3, generator=generator, output_type="np").images
    DDPMPipeline.from_pretrained(source).save_pretrained(target)
    modules = [type(part).__module__ for part in (pipe, pipe.unet, pipe.scheduler)]
    results.append([modules, images.tolist(), target])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder of the built-in model as each library saves it."""
    import diffusers

    ours, theirs = (tmp_path_factory.mktemp(name) for name in ("ours", "theirs"))
    DDIMPipeline.from_pretrained("mnist").save_pretrained(ours)
    diffusers.DDIMPipeline.from_pretrained(ours).save_pretrained(theirs)
    return {"ours": ours, "theirs": theirs}


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without the library's version and the place of the file."""
    return {k: v for k, v in config.items() if "_version" not in k and k != "_name_or_path"}


@pytest.fixture(scope="module")
def results(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return what the script reports, by imports and by who saved the folder; one process for each kind of imports."""
    results = {}
    for name, imports in IMPORTS.items():
        target = tmp_path_factory.mktemp("saved")
        arguments = [path for saved_by, source in folders.items() for path in (source, target / saved_by)]
        results[name] = dict(
            zip(folders, run(f"{imports}\n{SCRIPT}", *arguments, fresh=name == "installed last"), strict=True)
        )
    return results


@pytest.mark.parametrize("saved_by", ["ours", "theirs"])
@pytest.mark.parametrize("imports", ["installed first", "installed last"])
def test_unmodified_script(imports: str, saved_by: str, results: dict[str, dict[str, Any]]) -> None:
    theirs, expected, expected_folder = results["not installed"][saved_by]
    assert all(name.startswith("diffusers.") for name in theirs)
    ours, images, folder = results[imports][saved_by]
    assert ours == ["ddim.pipeline", "ddim.unet", "ddim.scheduler"]
    assert np.abs(np.array(images) - np.array(expected)).max() <= 1e-5
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        a, b = (json.loads(Path(path, name).read_text()) for path in (folder, expected_folder))
        assert comparable(a) == comparable(b)
    assert Path(folder, "unet/diffusion_pytorch_model.safetensors").is_file()


JOINED = """
import json, sys
{first}
from ddim import DDIMPipeline, DDIMScheduler, UNet2DModel
{second}
unet = UNet2DModel.from_pretrained("mnist", "unet")
{third}
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin
DDPMPipeline(unet, DDPMScheduler()).save_pretrained(sys.argv[1])
again = DDPMPipeline.from_pretrained(sys.argv[1], unet=unet).unet is unet
pipe = DDIMPipeline(unet, DDIMScheduler())
print(json.dumps([isinstance(unet, ModelMixin), isinstance(DDIMScheduler(), SchedulerMixin),
                  isinstance(pipe, DiffusionPipeline), again, type(unet).__module__]))
"""


@pytest.mark.parametrize("position", range(3))
def test_pipelines_of_diffusers_save_our_networks(position: int, tmp_path: Path) -> None:
    """Whenever `diffusers` is imported; without `install`."""
    lines = ["", "", ""]
    lines[position] = "import diffusers; from diffusers import DDPMPipeline"
    script = JOINED.format(first=lines[0], second=lines[1], third=lines[2])
    assert run(script, tmp_path, fresh=position == 0, is_silent=False) == [True, True, True, True, "ddim.unet"]
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert (tmp_path / "unet/diffusion_pytorch_model.safetensors").is_file()
    assert DDIMPipeline.from_pretrained(tmp_path).unet.num_parameters() > 0
