"""The work of the tabs as named endpoints, for `gradio_client` and other programs; docs/web-page.md lists them.

Names and settings are those of the command line. Arguments are checked as they come, images are files that the client
uploads; an error is one sentence. While an endpoint waits for other runs it reports `{"waiting": 2}`, while it runs
`{"done": 3, "total": 20, "seconds": 0.1}`; its last report is the result.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from functools import wraps
from typing import Any

import gradio as gr
from gradio.events import api
from PIL import Image

from ddim.app import inputs
from ddim.app.conditions import ANY, ConditionSettings
from ddim.app.events import DEVICE_EVENT, REPORTED_ERRORS, Endpoint, Shared, make_download_folder
from ddim.app.handlers import interpolate as interpolation
from ddim.app.handlers import invert as inversion
from ddim.app.handlers import sample as sampling
from ddim.app.handlers import steps as comparison
from ddim.app.listeners import StreamAudience
from ddim.app.measurements import Hole, Measurement, Reduced, Source, read_mask
from ddim.app.pictures import Picture, fit
from ddim.app.restoration import DEFAULT_STEPS, RestoreSettings, restore
from ddim.app.runs import Run, RunProgress, RunResult, RunWaiting, run_events
from ddim.io.image_files import save_image

Answer = dict[str, Any]
Work = Callable[[Run], Answer]


def add_endpoints(shared: Shared) -> None:
    """Add the endpoints to the page that is being built.

    Args:
        shared: the models and the folders of files.
    """
    first, open_model = shared.models.names[0], shared.models.open

    def files(images: Sequence[Image.Image]) -> list[Answer]:
        folder = make_download_folder(shared.downloads)
        paths = [folder / f"{index:05d}.png" for index in range(len(images))]
        for image, path in zip(images, paths, strict=True):
            save_image(image, path)
        return [gr.FileData(path=str(path), orig_name=path.name, mime_type="image/png").model_dump() for path in paths]

    def fit_upload(source: Any, model: str) -> Picture:
        # Fitted at once: runs that wait must not hold images of 25 million pixels.
        picture: Picture = inputs.upload(source, shared.uploads, lambda image: fit(open_model(model), image))
        return picture

    def sample(
        model: str = first,
        count: int = 16,
        steps: int = 20,
        seed: int = 0,
        eta: float = 0.0,
        order: int | str = sampling.MODELS_OWN,
        spacing: str = sampling.MODELS_OWN,
        label: str = ANY,
        guidance: float = 1.0,
    ) -> Work:
        """Sample images; image i depends on seed + i."""
        classes = open_model(model).classes
        settings = sampling.SampleSettings.checked(steps, eta, order, spacing, count, seed)
        settings = settings.of_class(label, guidance, classes)

        def work(run: Run) -> Answer:
            images = sampling.sample(run, open_model(model), settings).images
            evaluations = settings.nfe * settings.count
            return {"seeds": list(settings.seeds), "images": files(images), "evaluations": evaluations}

        return work

    def consistency(model: str = first, count: int = 4, seed: int = 0, label: str = ANY, guidance: float = 1.0) -> Work:
        """Sample the same latents by DDIM in several numbers of steps, and by DDPM in all of them."""
        num_latents, first_seed = inputs.integer("count", count, 1, inputs.MAX_LATENTS), inputs.seed(seed)
        condition = ConditionSettings.checked(label, guidance, open_model(model).classes, num_latents)

        def work(run: Run) -> Answer:
            rows = comparison.compare(run, open_model(model), first_seed, num_latents, condition)
            return {
                "rows": [
                    {"method": row.method, "steps": row.steps, "seconds": row.seconds, "images": files(row.images)}
                    for row in rows
                ]
            }

        return work

    def interpolate(
        model: str = first,
        seeds: list[int] = [],  # noqa: B006 - a default that clients are shown; it is never changed
        pictures: list[gr.FileData] = [],  # noqa: B006
        frames: int = 11,
        steps: int = 20,
        closed: bool = False,
        label: str = ANY,
        guidance: float = 1.0,
    ) -> Work:
        """Interpolate through the latents of seeds, then those of images, in the order given; labels share them."""
        settings = interpolation.PathSettings.checked(frames, steps, closed)
        checked_seeds = [inputs.seed(seed) for seed in inputs.sequence("seeds", seeds, 0, inputs.MAX_LATENTS)]
        sources = inputs.sequence("pictures", pictures, 0, inputs.MAX_LATENTS)
        num_endpoints = len(checked_seeds) + len(sources)
        interpolation.check_endpoints([*checked_seeds, *sources])
        condition = ConditionSettings.checked(
            label, guidance, open_model(model).classes, num_endpoints, "the number of endpoints"
        )
        endpoints = [Endpoint(None, seed) for seed in checked_seeds]
        endpoints += [Endpoint(fit_upload(source, model)) for source in sources]

        def work(run: Run) -> Answer:
            path = interpolation.interpolate(run, open_model(model), endpoints, settings, condition)
            return {"images": files(path.frames)}

        return work

    def reconstruct(
        picture: gr.FileData, model: str = first, steps: int = 50, label: str = ANY, guidance: float = 1.0
    ) -> Work:
        """Encode an image exactly and by Euler's steps, and decode both latents."""
        S, image = inputs.integer("steps", steps, 2, inputs.MAX_STEPS), fit_upload(picture, model)
        condition = ConditionSettings.checked(label, guidance, open_model(model).classes, 1)

        def work(run: Run) -> Answer:
            results = inversion.invert(run, open_model(model), image, S, condition).results
            return {
                result.method.lower(): {
                    "image": files([result.image])[0],
                    "code": files([result.latent])[0],
                    "mean": result.mean,
                    "deviation": result.deviation,
                    "mse": result.mse,
                    "psnr": result.psnr,
                    "evaluations": result.nfe,
                }
                for result in results
            }

        return work

    def edit(
        picture: gr.FileData,
        model: str = first,
        strength: float = 0.5,
        count: int = 1,
        steps: int = 50,
        seed: int = 0,
        label: str = ANY,
        guidance: float = 1.0,
    ) -> Work:
        """Add noise to an image up to `strength` and sample from there; edit i has the noise of seed + i."""
        image, classes = fit_upload(picture, model), open_model(model).classes
        settings = inversion.EditSettings.checked(strength, steps, seed, count, label, guidance, classes)

        def work(run: Run) -> Answer:
            images = inversion.edit(run, open_model(model), image, settings)
            return {"seeds": list(settings.seeds), "images": files(images)}

        return work

    def restore_work(model: str, measurement: Measurement, settings: RestoreSettings) -> Work:
        def work(run: Run) -> Answer:
            result = restore(run, open_model(model), measurement, settings)
            measured, mean, spread = files([measurement.picture.shown, result.mean.shown, result.spread])
            return {
                "seeds": list(settings.seeds),
                "measurement": measured,
                "images": files([answer.shown for answer in result.answers]),
                "mean": mean,
                "spread": spread,
                "max_spread": result.max_spread,
                "evaluations": result.nfe * settings.count,
            }

        return work

    def inpaint(
        picture: gr.FileData,
        mask: gr.FileData,
        model: str = first,
        count: int = 1,
        steps: int = DEFAULT_STEPS,
        seed: int = 0,
        label: str = ANY,
        guidance: float = 1.0,
    ) -> Work:
        """Fill in what is missing of an image, where the mask, of the same size, is white."""
        base = open_model(model)
        settings = RestoreSettings.checked(count, steps, seed, label, guidance, base.classes)
        size, image = inputs.upload(picture, shared.uploads, lambda image: (image.size, fit(base, image)))
        missing = inputs.upload(mask, shared.uploads, lambda image: read_mask(base, image, size), "mask")
        return restore_work(model, Hole.of(base, image, missing), settings)

    def super_resolve(
        picture: gr.FileData,
        model: str = first,
        factor: int = 4,
        kernel: str = "box",
        count: int = 1,
        steps: int = DEFAULT_STEPS,
        seed: int = 0,
        label: str = ANY,
        guidance: float = 1.0,
    ) -> Work:
        """Sample images that are this one when made small; one of another size is made small first."""
        base = open_model(model)
        settings = RestoreSettings.checked(count, steps, seed, label, guidance, base.classes)
        source: Source = inputs.upload(picture, shared.uploads, lambda image: Source.of(base, image))
        return restore_work(model, Reduced.of(base, source, factor, kernel), settings)

    def info(model: str = first) -> Work:
        """Describe a model: parameters, cost, configurations, card."""
        name = shared.models.check(model)
        return lambda run: shared.models.facts(name)

    for prepare in (sample, consistency, interpolate, reconstruct, edit, inpaint, super_resolve, info):
        api(
            report_progress(prepare),
            api_name=prepare.__name__,
            api_description=prepare.__doc__,
            **DEVICE_EVENT,
        )


def report_progress(prepare: Callable[..., Work]) -> Callable[..., AsyncIterator[Answer]]:
    """Make an endpoint that runs work and reports its progress.

    Args:
        prepare: takes the endpoint's arguments, checks them, and returns the work.

    Returns:
        The endpoint.
    """

    @wraps(prepare)
    async def handle(*arguments: Any) -> AsyncIterator[Answer]:
        audience = StreamAudience.of_this_event()
        try:
            work = await asyncio.to_thread(prepare, *arguments)
            async with aclosing(run_events(work, audience)) as events:
                async for event in events:
                    if isinstance(event, RunWaiting):
                        yield {"waiting": event.ahead}
                    elif isinstance(event, RunProgress):
                        yield {"done": event.done, "total": event.total, "seconds": event.seconds}
                    elif isinstance(event, RunResult):
                        yield event.value | {"seconds": event.seconds}
        except REPORTED_ERRORS as error:
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from None

    return handle
