"""Scripts that publish and download, for a process whose hub is a `hub_server.Hub`.

They are no entries of `CLIENTS`: they must run in another process, by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers

from dropin.library import DDIM, DIFFUSERS, Library, Observed, file_names, make_pipeline, make_unet, outcome, sample
from hub_server import WRITER

LIBRARIES = {"diffusers": DIFFUSERS, "ddim": DDIM}


def published(name: str, folder: Path) -> Observed:
    """Publish a pipeline, a network and a scheduler in three ways each library has, and load them again.

    Args:
        name: of the library.
        folder: for what is saved here.
    """
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    lib: Library = LIBRARIES[name]
    owner = f"{name}-user"
    pipe = make_pipeline(lib, beta_end=0.01)
    pipe.push_to_hub(f"{owner}/pushed", token=WRITER, private=False, commit_message="Upload")
    pipe.save_pretrained(str(folder / "saved"), push_to_hub=True, repo_id=f"{owner}/saved", token=WRITER)
    pipe.unet.push_to_hub(f"{owner}/unet", token=WRITER)
    pipe.scheduler.push_to_hub(f"{owner}/scheduler", token=WRITER)
    make_unet(lib).save_pretrained(str(folder / "unet"), push_to_hub=True, repo_id=f"{owner}/unet-saved", token=WRITER)
    loaded: dict[str, Any] = {
        "pushed": lib.DDIMPipeline.from_pretrained(f"{owner}/pushed"),
        "saved": lib.DDIMPipeline.from_pretrained(f"{owner}/saved", revision="main", force_download=True),
        "parts": lib.DDIMPipeline(
            lib.UNet2DModel.from_pretrained(f"{owner}/unet"), lib.DDIMScheduler.from_pretrained(f"{owner}/scheduler")
        ),
        "subfolders": lib.DDIMPipeline(
            lib.UNet2DModel.from_pretrained(f"{owner}/pushed", subfolder="unet"),
            lib.DDIMScheduler.from_pretrained(f"{owner}/pushed", subfolder="scheduler"),
        ),
    }
    for other in loaded.values():
        other.set_progress_bar_config(disable=True)
    place = Path(lib.DDIMPipeline.download(f"{owner}/pushed"))
    return {
        "images": {key: sample(other) for key, other in loaded.items()},
        "names": [str(loaded[key].name_or_path).removeprefix(owner) for key in ("pushed", "saved")],
        "downloaded": [name for name in file_names(place) if name.endswith((".json", ".safetensors"))],
        "nowhere": outcome(lambda: lib.DDIMPipeline.from_pretrained(f"{owner}/nothing"), OSError, ValueError)
        in ("OSError", "ValueError"),
        "no network": outcome(lambda: lib.UNet2DModel.from_pretrained(f"{owner}/nothing"), OSError),
    }
