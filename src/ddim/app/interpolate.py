"""The tab that walks between pictures in latent space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ddim.app import inputs, page
from ddim.app.rendering import Cell, data_url, grid
from ddim.app.runs import Result, Run
from ddim.app.tab import (
    COPY_CHUNK_BYTES,
    Endpoint,
    Plan,
    Shared,
    Updates,
    answering,
    fit,
    following,
    fresh_folder,
    listed,
    number,
    run_by,
)
from ddim.diffusion.noise import noise_from_seeds
from ddim.io.image_files import save_animation
from ddim.pipeline import DDIMPipeline

STEPS = 20
"""With which seeds are painted, to be seen among the endpoints."""


@dataclass(frozen=True)
class Walk:
    """Frames in order, and which of them are endpoints."""

    frames: list[Image.Image]
    ends: list[int]


@dataclass(frozen=True)
class Settings:
    """Of a path: frames of each leg, both ends included; steps of encoding and decoding; whether it comes back to the
    first endpoint.
    """

    frames: int
    num_inference_steps: int
    closed: bool

    @classmethod
    def checked(cls, frames: Any, steps: Any, closed: Any) -> Settings:
        """From what a client sent; ValueError for the first that is not allowed."""
        return cls(
            inputs.whole("frames", frames, 2, inputs.MAX_FRAMES),
            inputs.whole("steps", steps, 2, inputs.MAX_STEPS),
            inputs.flag("closed", closed),
        )


def walk(run: Run, base: DDIMPipeline, endpoints: Sequence[Endpoint], settings: Settings) -> Walk:
    """Pictures are encoded, seeds are codes; then what lies between them is decoded."""
    pipe = run.pipeline(base)
    pictures = [endpoint.picture for endpoint in endpoints if endpoint.seed is None]
    S = settings.num_inference_steps
    found = iter(pipe.encode(pictures, S, verify=False).latents if pictures else ())
    codes = [
        next(found)
        if endpoint.seed is None
        else noise_from_seeds((1, *pipe.sample_shape), [endpoint.seed], pipe.device)()[0]
        for endpoint in endpoints
    ]
    images = pipe.interpolate(codes, frames=settings.frames, num_inference_steps=S, closed=settings.closed).images
    return Walk(images, list(range(0, len(images), settings.frames - 1)))


def find(run: Run, base: DDIMPipeline, seeds: Sequence[int], pictures: Sequence[Image.Image]) -> list[Endpoint]:
    """Endpoints of seeds, which are painted to be seen, and of pictures."""
    output: Any = run.pipeline(base)(len(seeds), num_inference_steps=STEPS, seeds=seeds) if seeds else None
    painted = [Endpoint(image, seed) for image, seed in zip(output.images if output else (), seeds, strict=True)]
    return [*painted, *(Endpoint(fit(base, picture)) for picture in pictures)]


def check_room(endpoints: Sequence[Endpoint], more: int) -> None:
    """ValueError for none to add, or where there is no room for them."""
    if not more:
        raise ValueError("nothing was given to add; give seeds such as 3, 14, 15, or pictures")
    if len(endpoints) + more > inputs.MAX_CODES:
        raise ValueError(
            f"{len(endpoints)} endpoints and {more} more are too many; at most {inputs.MAX_CODES} are taken"
        )


def check_ends(endpoints: Sequence[Any]) -> None:
    """ValueError for a path without two ends, or with too many."""
    if not 2 <= len(endpoints) <= inputs.MAX_CODES:
        raise ValueError(f"{number(len(endpoints), 'endpoint')} given; a path has 2 to {inputs.MAX_CODES}")


def parse_seeds(text: Any) -> list[int]:
    """`3, 14 15` as a list; ValueError for anything else."""
    words = str(text or "").replace(",", " ").split()
    if not all(word.isdecimal() and len(word) < 20 for word in words):
        raise ValueError(f"seeds is {inputs.said(text)}; it must be whole numbers such as 3, 14, 15")
    return [inputs.seed(int(word)) for word in words]


SCRUB = """
const show = (index) => {
  const slider = element.querySelector('input[type=range]');
  const frames = element.querySelectorAll('.strip img');
  if (!slider || !frames.length) return;
  slider.value = index;
  element.querySelector('.stage figure img').src = frames[index].src;
  element.querySelector('.stage figcaption').textContent = `frame ${Number(index) + 1} of ${frames.length}`;
};
let playing = null;
const play = (wanted) => {
  clearInterval(playing);
  playing = wanted ? setInterval(() => {
    const slider = element.querySelector('input[type=range]');
    if (slider) show((Number(slider.value) + 1) % (Number(slider.max) + 1));
  }, 100) : null;
  const button = element.querySelector('[data-play]');
  if (button) button.textContent = wanted ? 'Pause' : 'Play';
};
element.addEventListener('input', (event) => { play(false); show(event.target.value); });
element.addEventListener('click', (event) => {
  if (event.target.closest('[data-play]')) play(!playing);
});
"""
"""The slider shows a frame, the button lets them pass."""


def show(result: Walk) -> str:
    """The frame that is looked at, its slider, and the strip of all."""
    frames, last = result.frames, len(result.frames) - 1
    cells = [
        Cell(image, "end" if index in result.ends else " ", f"frame {index + 1} of {len(frames)}")
        for index, image in enumerate(frames)
    ]
    width, height = frames[0].size
    return f"""
<div class="stage">
  <figure><img src="{data_url(frames[0])}" alt="the frame that the slider shows" style="aspect-ratio:{width}/{height}">
  <figcaption>frame 1 of {len(frames)}</figcaption></figure>
  <div class="controls"><button type="button" data-play>Play</button>
  <input type="range" min="0" max="{last}" value="0" aria-label="Frame"></div>
</div>
<div class="strip">{grid(cells, (height, width), "All frames")}</div>"""


def save(result: Walk, folder: str | Path) -> str:
    """The path of an animation."""
    return str(save_animation(result.frames, fresh_folder(folder) / "walk.webp"))


def tab(shared: Shared) -> None:
    """Lay the tab out and connect it."""
    page.lead(
        "Between two codes lie other codes, and they are pictures too. A path from code to code, along the sphere on "
        "which Gaussian noise lies, becomes one picture turning into another.",
        "A picture has a code as well: it is found by walking DDIM backwards, and the path then goes through it.",
    )
    shared.listing.render()  # type: ignore[no-untyped-call]
    with gr.Row(equal_height=False):
        with gr.Column(min_width=260):
            with gr.Row(equal_height=False, elem_classes="ends"):
                seeds = gr.Textbox("3, 14", label="Seeds", max_lines=1, scale=3, min_width=120)
                add_seeds = gr.Button("Add seeds", size="md", scale=1, min_width=110)
            files = gr.File(label="Pictures", file_count="multiple", type="filepath", height=120)
        with gr.Column(min_width=260):
            frames = gr.Slider(2, inputs.MAX_FRAMES, 11, step=1, label="Frames a leg", info="Both ends included.")
            steps = gr.Slider(2, 200, 20, step=1, label="Steps", info="Of encoding and decoding.")
            closed = gr.Checkbox(label="Come back to the first", value=False)
    with gr.Row():
        go = gr.Button("Interpolate", variant="primary", min_width=120)
        stop = gr.Button("Stop", min_width=96)
        animation = gr.DownloadButton("Animation as WebP", interactive=False, min_width=140)
    status = gr.HTML(page.status("Give two endpoints or more."))
    strip = gr.HTML(js_on_load=SCRUB, elem_id="walk", min_height=420)

    def more(model: str, there: list[Endpoint], numbers: Sequence[int], paths: Sequence[str]) -> Plan[list[Endpoint]]:
        pictures = [
            inputs.upload(path, shared.uploads) for path in inputs.several("pictures", paths, 0, inputs.MAX_CODES)
        ]
        check_room(there, len(numbers) + len(pictures))

        def done(result: Result[list[Endpoint]]) -> Updates:
            words = page.status(f"{number(len(result.value), 'endpoint')} added.")
            endpoints = [*there, *result.value]
            return {status: words, shared.endpoints: endpoints, shared.listing: listed(endpoints)}

        return Plan("Adding", lambda run: find(run, shared.models.open(model), numbers, pictures), lambda _: {}, done)

    def more_seeds(model: str, there: list[Endpoint], text: Any) -> Plan[list[Endpoint]]:
        return more(model, there, parse_seeds(text), ())

    def more_files(model: str, there: list[Endpoint], paths: Any) -> Plan[list[Endpoint]]:
        return more(model, there, (), paths or ())

    def remove(there: list[Endpoint], event: gr.EventData) -> Updates:
        index = inputs.whole("endpoint", event.value, 0, len(there) - 1)
        endpoints = [endpoint for i, endpoint in enumerate(there) if i != index]
        return {shared.endpoints: endpoints, shared.listing: listed(endpoints)}

    def prepare(model: str, ends: list[Endpoint], frames: Any, steps: Any, closed: Any) -> Plan[Walk]:
        settings = Settings.checked(frames, steps, closed)
        check_ends(ends)

        def done(result: Result[Walk]) -> Updates:
            words = f"{number(len(result.value.frames), 'frame')} in {result.seconds:.2f} s."
            file = gr.DownloadButton(value=save(result.value, shared.files), interactive=True)
            return {status: page.status(words, 1), strip: show(result.value), animation: file}

        return Plan("Walking", lambda run: walk(run, shared.models.open(model), ends, settings), lambda _: {}, done)

    found = [
        gr.on(
            [add_seeds.click, seeds.submit],
            following(more_seeds, status),
            [shared.model, shared.endpoints, seeds],
            [status, shared.endpoints, shared.listing],
            **run_by(status),
        ),
        files.upload(
            following(more_files, status),
            [shared.model, shared.endpoints, files],
            [status, shared.endpoints, shared.listing],
            **run_by(status),
        ),
        go.click(
            following(prepare, status),
            [shared.model, shared.endpoints, frames, steps, closed],
            [status, strip, animation],
            **run_by(status),
        ),
    ]
    stop.click(lambda: page.status("Stopped."), None, status, cancels=found, **COPY_CHUNK_BYTES)
    shared.listing.select(
        answering(remove, status), shared.endpoints, [status, shared.endpoints, shared.listing], **COPY_CHUNK_BYTES
    )
