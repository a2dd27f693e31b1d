"""Measure how many samples of a model of scikit-learn's digits an SVM recognizes as the digit they were sampled for.

    ddim train --preset digits-labels --out runs/classes
    python scripts/digits_svm.py runs/classes --guidance 1 1.5 2

The SVM is trained on all real digits; its accuracy on a quarter of them, trained on the others, is printed first. The
standard deviation of the samples of a class, beside that of its real images, shows what guidance takes in diversity.
"""

from __future__ import annotations

import argparse

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from ddim import DDIMPipeline


def deviation(images: np.ndarray, labels: np.ndarray) -> float:
    """Return the standard deviation of pixels (N, 64) within a class, the mean over pixels and classes."""
    return float(np.mean([images[labels == label].std(0).mean() for label in range(10)]))


def main() -> None:
    """Print a line per scale of guidance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model of the digits with labels")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0])
    parser.add_argument("--count", type=int, default=1000, help="number of samples, a multiple of 10")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    images, digits = load_digits(return_X_y=True)
    images_train, images_test, digits_train, digits_test = train_test_split(
        images, digits, test_size=0.25, random_state=0, stratify=digits
    )
    accuracy = SVC(C=10, gamma=0.001).fit(images_train, digits_train).score(images_test, digits_test)
    print(f"real digits       {accuracy:.1%} agreement, deviation {deviation(images, digits):.2f} of 16")

    svm = SVC(C=10, gamma=0.001).fit(images, digits)
    pipe = DDIMPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    labels = np.repeat(np.arange(10), arguments.count // 10)
    for scale in arguments.guidance:
        samples = pipe.sample_images(
            len(labels),
            num_inference_steps=arguments.steps,
            class_labels=labels.tolist(),
            guidance_scale=scale,
            output_type="np",
        )
        pixels = 16 * np.stack(samples).reshape(len(labels), 64)
        agreement = float((svm.predict(pixels) == labels).mean())
        print(f"guidance {scale:<8g} {agreement:.1%} agreement, deviation {deviation(pixels, labels):.2f} of 16")


if __name__ == "__main__":
    main()
