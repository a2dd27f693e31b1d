"""The settings of the tab Sample, without a server."""

from __future__ import annotations

import torch

from ddim.app.handlers.sample import MODELS_OWN, SampleSettings, sample
from ddim.app.runs import Run
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel
from digits import TINY_MODEL

ROWS = [[900, 880, 0.1], [500, 520, -0.2, 0.3], [100, 90, 0.05, 0.1, -0.4]]


def test_models_own_order_takes_what_the_model_has_learned() -> None:
    torch.manual_seed(0)
    scheduler = DDIMScheduler(clip_sample=False, coefficients_by_steps={"3": ROWS})
    pipe = DDIMPipeline(UNet2DModel(**TINY_MODEL).eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    expected = {
        MODELS_OWN: pipe(seeds=[7, 8], num_inference_steps=3).images,
        1: pipe(seeds=[7, 8], num_inference_steps=3, order=1).images,
    }
    for order, images in expected.items():
        settings = SampleSettings.checked(3, 0, order, MODELS_OWN, 2, 7)
        shown = sample(Run(lambda event: None), pipe, settings).images
        assert [image.tobytes() for image in shown] == [image.tobytes() for image in images]
        assert ("--order 1" in settings.as_command("m")) == ("order=1" in settings.as_python("m")) == (order == 1)
    assert expected[MODELS_OWN][0].tobytes() != expected[1][0].tobytes()
