"""The discrete DDIM of appendix A of arXiv 2010.02502: images whose entries are one of K values.

    from ddim.discrete import DiscreteDDIMPipeline

    pipe = DiscreteDDIMPipeline.from_pretrained("runs/binary")  # ddim train --process discrete
    pipe(seeds=range(16), num_inference_steps=20).images[0].save("digit.png")

`process` is the mathematics; `values` is what values mean as gray and as channels of a network.
"""

from __future__ import annotations

from ddim.discrete.pipeline import DiscreteDDIMPipeline
from ddim.discrete.scheduler import DiscreteDDIMScheduler

__all__ = ["DiscreteDDIMPipeline", "DiscreteDDIMScheduler"]
