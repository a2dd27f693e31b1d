"""Encode images into latents and decode them again, exactly and by Euler steps, with the built-in model.

python examples/invert.py                         # four digits that the model generates
python examples/invert.py one.png two.png         # images of your own: 28x28, gray
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from ddim import DDIMPipeline


def main() -> None:
    """Print the error and the cost of both ways to invert."""
    parser = argparse.ArgumentParser(description="Encode and decode images with the built-in model.")
    parser.add_argument("images", type=Path, nargs="*", help="28x28 gray images; generated ones by default")
    parser.add_argument("--steps", type=int, default=10, help="number of steps, in either direction")
    options = parser.parse_args()

    pipe = DDIMPipeline.from_pretrained("mnist")
    pipe.set_progress_bar_config(disable=True)
    images = [Image.open(path) for path in options.images] or pipe.sample_images(4, num_inference_steps=10)
    print("method  mean squared error  function evaluations per step")
    for name, exact in (("Euler", False), ("exact", True)):
        result = pipe.reconstruct(images, options.steps, exact=exact)
        nfe = result.codes.evaluations.double().mean()
        print(f"{name:<8}{float(result.mse.mean()):<20.1e}{float(nfe):.1f}")


if __name__ == "__main__":
    main()
