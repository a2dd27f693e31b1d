"""The tabs' work as named endpoints for `gradio_client` and other programs; docs/app.md lists them.

Names and settings are those of the command line. Numbers are checked as they come, pictures are files that the client
uploads; whatever is wrong is told in one sentence. While it works, an endpoint tells how far it is,
`{"done": 3, "total": 20, "seconds": 0.1}`; what it tells last is its result.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from functools import wraps
from typing import Any

import gradio as gr
from gradio.events import api
from PIL import Image

from ddim.app import inputs
from ddim.app import interpolate as between
from ddim.app import invert as inversion
from ddim.app import sample as sampling
from ddim.app import steps as comparison
from ddim.app.runs import Result, Run, Step, start
from ddim.app.tab import ANSWERED, DEVICE, Endpoint, Shared, fit, fresh_folder
from ddim.io.image_files import save_image

Answer = dict[str, Any]
Work = Callable[[Run], Answer]


def endpoints(shared: Shared) -> None:
    """Add them to the page that is being built."""
    first, open_model = shared.models.names[0], shared.models.open

    def files(images: Sequence[Image.Image]) -> list[Answer]:
        folder = fresh_folder(shared.files)
        paths = [folder / f"{index:05d}.png" for index in range(len(images))]
        for image, path in zip(images, paths, strict=True):
            save_image(image, path)
        return [gr.FileData(path=str(path), orig_name=path.name, mime_type="image/png").model_dump() for path in paths]

    def sample(
        model: str = first,
        count: int = 16,
        steps: int = 20,
        seed: int = 0,
        eta: float = 0.0,
        order: int = 1,
        spacing: str = sampling.MODELS_OWN,
    ) -> Work:
        """Paint pictures; picture i is that of seed + i."""
        settings = sampling.Settings.checked(steps, eta, order, spacing, count, seed)

        def work(run: Run) -> Answer:
            images = sampling.paint(run, open_model(model), settings).images
            evaluations = settings.num_inference_steps * settings.count
            return {"seeds": list(settings.seeds), "images": files(images), "evaluations": evaluations}

        return work

    def consistency(model: str = first, count: int = 4, seed: int = 0) -> Work:
        """Paint the same codes by DDIM in several numbers of steps, and by DDPM in all of them."""
        codes, number = inputs.whole("count", count, 1, inputs.MAX_CODES), inputs.seed(seed)

        def work(run: Run) -> Answer:
            rows = comparison.compare(run, open_model(model), number, codes)
            told = [{"method": row.name, "steps": row.steps, "seconds": row.seconds} for row in rows]
            return {"rows": [facts | {"images": files(row.images)} for facts, row in zip(told, rows, strict=True)]}

        return work

    def interpolate(
        model: str = first,
        seeds: list[int] = [],  # noqa: B006 - a default that clients are shown; it is never changed
        pictures: list[gr.FileData] = [],  # noqa: B006
        frames: int = 11,
        steps: int = 20,
        closed: bool = False,
    ) -> Work:
        """Walk through the codes of seeds, then those of pictures, in the order given."""
        settings = between.Settings.checked(frames, steps, closed)
        numbers = [inputs.seed(seed) for seed in inputs.several("seeds", seeds, 0, inputs.MAX_CODES)]
        sources = inputs.several("pictures", pictures, 0, inputs.MAX_CODES)
        between.check_ends([*numbers, *sources])
        uploads = [inputs.upload(source, shared.uploads) for source in sources]

        def work(run: Run) -> Answer:
            base = open_model(model)
            ends = [*map(Endpoint.of_seed, numbers), *(Endpoint(fit(base, picture)) for picture in uploads)]
            return {"images": files(between.walk(run, base, ends, settings).frames)}

        return work

    def reconstruct(picture: gr.FileData, model: str = first, steps: int = 50) -> Work:
        """Find a picture's code, exactly and by Euler's steps, and decode it."""
        image, S = inputs.upload(picture, shared.uploads), inputs.whole("steps", steps, 2, inputs.MAX_STEPS)

        def work(run: Run) -> Answer:
            ways = inversion.invert(run, open_model(model), image, S).ways
            return {
                way.name.lower(): {
                    "image": files([way.image])[0],
                    "code": files([way.code])[0],
                    "mean": way.mean,
                    "deviation": way.deviation,
                    "mse": way.mse,
                    "psnr": way.psnr,
                    "evaluations": way.evaluations,
                }
                for way in ways
            }

        return work

    def edit(
        picture: gr.FileData,
        model: str = first,
        strength: float = 0.5,
        count: int = 1,
        steps: int = 50,
        seed: int = 0,
    ) -> Work:
        """Cover a picture with noise up to `strength`, and paint from there; edit i has the noise of seed + i."""
        image, edits = inputs.upload(picture, shared.uploads), inversion.Edits.checked(strength, steps, seed, count)

        def work(run: Run) -> Answer:
            images = inversion.edit(run, open_model(model), image, edits)
            return {"seeds": list(edits.seeds), "images": files(images)}

        return work

    def info(model: str = first) -> Work:
        """Tell what a model is: parameters, cost, configurations, card."""
        name = shared.models.check(model)
        return lambda run: shared.models.facts(name)

    for prepare in (sample, consistency, interpolate, reconstruct, edit, info):
        api(told(prepare), api_name=prepare.__name__, api_description=prepare.__doc__, **DEVICE)


def told(prepare: Callable[..., Work]) -> Callable[..., AsyncIterator[Answer]]:
    """An endpoint that does what `prepare` makes of its arguments, and tells how far it is."""

    @wraps(prepare)
    async def handle(*given: Any) -> AsyncIterator[Answer]:
        try:
            async with aclosing(start(prepare(*given))) as events:
                async for event in events:
                    if isinstance(event, Step):
                        yield {"done": event.done, "total": event.total, "seconds": event.seconds}
                    elif isinstance(event, Result):
                        yield event.value | {"seconds": event.seconds}
        except ANSWERED as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from None

    return handle
