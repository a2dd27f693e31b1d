"""Conversion of other projects' checkpoints of DDPM and DDIM U-Nets to pipeline folders.

    a file  --checkpoint-->  its tensors  --ddpm, openai-->  a plan  --placement-->  the U-Net's tensors

A layout (`ddpm`, `openai`) is the naming scheme of one family of code. From the names and shapes of a checkpoint's
tensors it reads the network's configuration, and which of the checkpoint's modules becomes which of the U-Net's. Every
tensor must be used, with its shape; networks that the U-Net cannot compute exactly are refused.

A third layout, `diffusers`, is any folder that `DDIMPipeline.from_pretrained` loads; it is written in today's format.
"""

from ddim.convert.conversion import LAYOUTS, CheckpointSettings, convert, make_pipeline
from ddim.convert.openai import OpenAIFlags

__all__ = ["LAYOUTS", "CheckpointSettings", "OpenAIFlags", "convert", "make_pipeline"]
