"""The tab that paints: settings, the pictures as they form, and the same run in Python and on the command line."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ddim.app import inputs, page
from ddim.app.rendering import Cell, grid
from ddim.app.runs import Result, Run
from ddim.app.tab import (
    COPY_CHUNK_BYTES,
    Endpoint,
    Plan,
    Shared,
    Updates,
    answering,
    following,
    fresh_folder,
    listed,
    number,
    run_by,
)
from ddim.diffusion.schedule import SPACINGS
from ddim.io.images import save_images
from ddim.pipeline import DDIMPipeline

MODELS_OWN = "the model's own"
RANDOM_SEED = "() => Math.floor(Math.random() * 2 ** 32)"


@dataclass(frozen=True)
class Settings:
    """What is painted, and how, in the names of `DDIMPipeline.__call__`; picture i is that of seed `seed + i`."""

    num_inference_steps: int = 20
    eta: float = 0.0
    order: int = 1
    spacing: str = MODELS_OWN
    count: int = 16
    seed: int = 0

    @classmethod
    def checked(cls, steps: Any, eta: Any, order: Any, spacing: Any, count: Any, seed: Any) -> Settings:
        """From what a client sent; ValueError for the first that is not allowed."""
        return cls(
            inputs.whole("steps", steps, 1, inputs.MAX_STEPS),
            inputs.real("eta", eta, 0, inputs.MAX_ETA),
            inputs.whole("order", order, 1, 2),
            inputs.choice("spacing", spacing, [MODELS_OWN, *SPACINGS]),
            inputs.whole("count", count, 1, inputs.MAX_COUNT),
            inputs.seed(seed),
        )

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.count)

    def timesteps(self, pipe: DDIMPipeline) -> list[int] | None:
        """Those of the spacing; `None` for the model's own."""
        if self.spacing == MODELS_OWN:
            return None
        return pipe.scheduler.make_timesteps(self.num_inference_steps, self.spacing)

    def as_python(self, model: str) -> str:
        """The same run as a program."""
        lines = ["from ddim import DDIMPipeline", "", f"pipe = DDIMPipeline.from_pretrained({model!r})"]
        walked = f"num_inference_steps={self.num_inference_steps}"
        if self.spacing != MODELS_OWN:
            lines.append(f"timesteps = pipe.scheduler.make_timesteps({self.num_inference_steps}, {self.spacing!r})")
            walked = "timesteps=timesteps"
        lines.append(
            f"images = pipe.sample_images({self.count}, seed={self.seed}, {walked}, eta={self.eta}, order={self.order})"
        )
        return "\n".join(lines)

    def as_command(self, model: str) -> str:
        """The same run on the command line."""
        spacing = "" if self.spacing == MODELS_OWN else f" --spacing {self.spacing}"
        return (
            f"ddim sample --model {shlex.quote(model)} --count {self.count} --seed {self.seed} "
            f"--steps {self.num_inference_steps} --eta {self.eta} --order {self.order}{spacing} --out samples.png"
        )


@dataclass(frozen=True, eq=False)  # as `Endpoint`
class Painted:
    """Images, and the settings they were painted with."""

    settings: Settings
    images: list[Image.Image]

    def endpoint(self, index: int) -> Endpoint:
        """Picture i as the end of a path: its seed; or, where noise was added on the way, the picture itself."""
        seed = self.settings.seeds[index] if self.settings.eta == 0 else None
        return Endpoint(self.images[index], seed)


def paint(run: Run, base: DDIMPipeline, settings: Settings) -> Painted:
    """The pictures of `ddim sample` with these settings."""
    pipe = run.pipeline(base)
    output: Any = pipe(
        settings.count,
        eta=settings.eta,
        num_inference_steps=settings.num_inference_steps,
        timesteps=settings.timesteps(pipe),
        seeds=settings.seeds,
        order=settings.order,
        callback_on_step_end=run.preview,
    )
    return Painted(settings, output.images)


def show(
    images: Sequence[Image.Image], settings: Settings, endpoints: Sequence[Endpoint] = (), final: bool = False
) -> str:
    """The pictures as HTML; the final ones can be pinned and saved, and those that are pinned are marked."""
    pinned = {id(endpoint.picture) for endpoint in endpoints}
    cells = [
        Cell(image, f"seed {seed}", f"picture of seed {seed}", f"seed-{seed}.png", "Pin", index, id(image) in pinned)
        if final
        else Cell(image, f"seed {seed}", f"picture of seed {seed}, unfinished")
        for index, (image, seed) in enumerate(zip(images, settings.seeds, strict=True))
    ]
    return grid(cells, images[0].size[::-1], "Pictures")


def save(painted: Painted, folder: str | Path) -> tuple[str, str]:
    """Paths of the grid and of the array, as `ddim sample` writes them."""
    own = fresh_folder(folder)
    return str(save_images(painted.images, own / "samples.png")), str(save_images(painted.images, own / "samples.npz"))


def tab(shared: Shared) -> None:
    """Lay the tab out and connect it."""
    start = Settings()
    painted = gr.State(None)
    page.lead(
        "DDIM turns noise into pictures. Each picture starts from a code, a field of random numbers that its seed "
        "decides, and a network takes the noise away in a number of steps.",
        "Press <b>Paint</b>. Then halve the steps: the same digits come, in half the time. Raise eta: noise is added "
        "on the way, and the code alone no longer decides.",
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=280):
            steps = gr.Slider(1, inputs.MAX_STEPS, start.num_inference_steps, step=1, label="Steps",
                              info="Network evaluations a picture: fewer are faster, more are finer.")  # fmt: skip
            count = gr.Slider(1, inputs.MAX_COUNT, start.count, step=1, label="Pictures")
            with gr.Row(equal_height=False, elem_classes="ends"):
                seed = gr.Number(start.seed, label="Seed", precision=0, minimum=0, maximum=inputs.MAX_SEED, scale=3,
                                 min_width=120, info="Picture i is that of seed + i.")  # fmt: skip
                die = gr.Button("New seed", size="md", scale=1, min_width=96)
            with gr.Accordion("More settings", open=False):
                eta = gr.Slider(0, 1, start.eta, step=0.05, label="Eta",
                                info="0 is DDIM, 1 is DDPM; between them, some noise in each step.")  # fmt: skip
                order = gr.Radio([("1: DDIM", 1), ("2: two-step", 2)], value=start.order, label="Order",
                                 info="2 uses two predictions at the same cost, and wants eta = 0.")  # fmt: skip
                spacing = gr.Dropdown([MODELS_OWN, *SPACINGS], value=start.spacing, label="Spacing",
                                      info="Which of the timesteps are walked.")  # fmt: skip
            with gr.Row():
                go = gr.Button("Paint", variant="primary", min_width=120)
                stop = gr.Button("Stop", min_width=96)
        with gr.Column(scale=5, min_width=300):
            status = gr.HTML(page.status("Nothing is painted yet."), elem_id="sample-status")
            pictures = gr.HTML(grid([Cell(None, " ")] * start.count, (1, 1), "Pictures"), js_on_load=page.CLICKS,
                               elem_id="sample-pictures")  # fmt: skip
            with gr.Row():
                as_grid = gr.DownloadButton("Grid as PNG", interactive=False, size="md", min_width=120)
                as_array = gr.DownloadButton("Array as NPZ", interactive=False, size="md", min_width=120)
            with gr.Accordion("The same in Python and on the command line", open=False):
                python = gr.Code(start.as_python(shared.models.names[0]), language="python", label="Python")
                command = gr.Code(start.as_command(shared.models.names[0]), language="shell", label="Command line")

    def prepare(model: str, *given: Any) -> Plan[Painted]:
        settings = Settings.checked(*given)

        def preview(images: list[Image.Image]) -> Updates:
            return {pictures: show(images, settings)}

        def done(result: Result[Painted]) -> Updates:
            S, images = settings.num_inference_steps, result.value.images
            grid_file, array_file = save(result.value, shared.files)
            words = (
                f"{number(len(images), 'picture')} in {result.seconds:.2f} s: {number(S, 'network evaluation')} each, "
                f"{S * len(images)} in all. Click a picture to pin it for the other tabs."
            )
            return {
                status: page.status(words, 1),
                pictures: show(images, settings, final=True),
                painted: result.value,
                as_grid: gr.DownloadButton(value=grid_file, interactive=True),
                as_array: gr.DownloadButton(value=array_file, interactive=True),
                python: settings.as_python(model),
                command: settings.as_command(model),
            }

        return Plan("Painting", lambda run: paint(run, shared.models.open(model), settings), preview, done)

    def pin(last: Painted | None, endpoints: list[Endpoint], event: gr.EventData) -> Updates:
        if last is None:
            return {}
        index = inputs.whole("picture", event.value, 0, len(last.images) - 1)
        others = [endpoint for endpoint in endpoints if endpoint.picture is not last.images[index]]
        if len(others) == len(endpoints) == inputs.MAX_CODES:
            raise ValueError(f"{inputs.MAX_CODES} pictures are pinned; click one of them to make room")
        endpoints = others if len(others) < len(endpoints) else [*endpoints, last.endpoint(index)]
        return {
            shared.endpoints: endpoints,
            shared.listing: listed(endpoints),
            pictures: show(last.images, last.settings, endpoints, final=True),
        }

    run = gr.on(
        [go.click, seed.submit],
        following(prepare, status),
        [shared.model, steps, eta, order, spacing, count, seed],
        [status, pictures, painted, as_grid, as_array, python, command],
        **run_by(status),
    )
    stop.click(lambda: page.status("Stopped."), None, status, cancels=run, **COPY_CHUNK_BYTES)
    die.click(None, None, seed, js=RANDOM_SEED, **COPY_CHUNK_BYTES)
    pictures.select(
        answering(pin, status),
        [painted, shared.endpoints],
        [status, shared.endpoints, shared.listing, pictures],
        **COPY_CHUNK_BYTES,
    )
