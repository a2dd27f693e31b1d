"""The comparison of the tab Steps, without a server."""

from __future__ import annotations

from ddim.app.handlers.steps import compare
from ddim.app.runs import Run
from ddim.pipeline import DDIMPipeline
from ddim.scheduler import DDIMScheduler
from ddim.unet import UNet2DModel


def test_ddpm_row_of_a_second_order_model_has_order_1() -> None:
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
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
