"""The comparison of the tab Steps, without a server."""

from __future__ import annotations

from typing import Any

import numpy as np

from ddim.app.conditions import ConditionSettings
from ddim.app.handlers.steps import compare
from ddim.app.runs import Run
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel


def make_unet(**settings: Any) -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        **settings,
    )


def test_ddpm_row_of_a_second_order_model_has_order_1() -> None:
    unet = make_unet()
    rows = {
        order: compare(
            Run(lambda event: None),
            DDIMPipeline(unet, DDIMScheduler(num_train_timesteps=8, solver_order=order)),
            seed=3,
            count=2,
        )
        for order in (1, 2)
    }
    assert [(row.method, row.steps) for row in rows[2]] == [("DDIM", 5), ("DDPM", 8)]
    first_order, second_order = ([image.tobytes() for image in rows[order][-1].images] for order in (1, 2))
    assert first_order == second_order


def test_rows_are_of_a_class() -> None:
    pipe = DDIMPipeline(make_unet(num_class_embeds=3, has_null_class=True), DDIMScheduler(num_train_timesteps=8))
    pipe.set_progress_bar_config(disable=True)
    condition = ConditionSettings.checked("1", 2.0, pipe.classes, 2)
    rows = compare(Run(lambda event: None), pipe, 3, 2, condition)
    expected = pipe(seeds=[3, 4], num_inference_steps=5, class_labels=1, guidance_scale=2.0).images
    unconditional = pipe(seeds=[3, 4], num_inference_steps=5).images
    for image, same, other in zip(rows[0].images, expected, unconditional, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(same))
        assert not np.array_equal(np.asarray(image), np.asarray(other))
