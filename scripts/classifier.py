"""Train a classifier whose features and attributes evaluate samples.

    python scripts/classifier.py mnist mnist/train.parquet mnist/test.parquet [--out mnist_classifier.safetensors]
    python scripts/classifier.py faces faces/train.parquet faces/test.parquet [--out faces_classifier.safetensors]

Takes some minutes on one core. Prints the accuracy on the test set for each attribute; the weights are stored in half
precision.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ddim.evaluation.attributes import read_labels
from ddim.evaluation.classifiers import CLASSIFIERS, DigitClassifier, FaceClassifier, classifier_path
from ddim.evaluation.image_sets import open_files

BATCH_SIZE, LEARNING_RATE = 128, 2e-3


class Recipe(NamedTuple):
    """How a classifier is trained.

    Attributes:
        epochs: passes over the training images.
        noise: standard deviation, in gray levels, of the noise added to them.
    """

    epochs: int
    noise: float


# Drawn colors are exact: without noise, a classifier could distinguish them by differences that nobody sees.
RECIPES = {"mnist": Recipe(epochs=6, noise=0), "faces": Recipe(epochs=12, noise=4)}


def read(path: Path, model: DigitClassifier | FaceClassifier) -> tuple[Tensor, dict[str, Tensor]]:
    """Read images, uint8 (N, C, H, W), and the labels (N,) of each attribute."""
    images = open_files(str(path), shape=model.shape)
    return torch.cat(list(images.batches())), read_labels(images, model)


def add_noise(images: Tensor, deviation: float) -> Tensor:
    """Add Gaussian noise to images, uint8 (N, C, H, W)."""
    if not deviation:
        return images
    return (images + deviation * torch.randn(images.shape)).round().clamp(0, 255).byte()


@torch.no_grad()
def accuracy(model: DigitClassifier | FaceClassifier, images: Tensor, labels: dict[str, Tensor]) -> dict[str, float]:
    """Return the fraction of images whose value is recognized, for each attribute."""
    features = torch.cat([model(batch) for batch in images.split(BATCH_SIZE)])
    logits = model.attribute_logits(features)
    return {name: float((logits[name].argmax(1) == labels[name]).double().mean()) for name in labels}


def main() -> None:
    """Train, test and save the classifier."""
    parser = argparse.ArgumentParser(description="Train a classifier of images' attributes.")
    parser.add_argument("name", choices=CLASSIFIERS, help="which classifier")
    parser.add_argument("train", type=Path, help="the training images, a parquet file with a column per attribute")
    parser.add_argument("test", type=Path, help="the test images, likewise")
    parser.add_argument("--out", type=Path, help="a safetensors file; defaults to the one of the package")
    options = parser.parse_args()
    epochs, noise = RECIPES[options.name]
    torch.manual_seed(0)
    model = CLASSIFIERS[options.name]()
    images, labels = read(options.train, model)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    steps = epochs * -(-len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for epoch in range(epochs):
        for indices in torch.randperm(len(images)).split(BATCH_SIZE):
            logits = model.attribute_logits(model(add_noise(images[indices], noise)))
            loss = torch.stack([F.cross_entropy(logits[name], labels[name][indices]) for name in labels]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {float(loss.detach()):.4f}", flush=True)
    model.half().float().eval()
    images, labels = read(options.test, model)
    for name, value in accuracy(model, images, labels).items():
        print(f"accuracy on {len(images)} test images, {name}: {value:.4f}")
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, options.out or classifier_path(options.name))


if __name__ == "__main__":
    main()
