"""Train the classifier of digits whose features evaluate the built-in model.

    python scripts/classifier.py mnist/train.parquet mnist/test.parquet [--out mnist_classifier.safetensors]

Takes some minutes on one core. Prints the accuracy on the test set; the weights are stored in half precision.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor

from ddim.data.config import DataConfig
from ddim.data.dataset import open_dataset
from ddim.evaluation.features import CLASSIFIER, DigitClassifier

EPOCHS, BATCH_SIZE, LEARNING_RATE = 6, 128, 2e-3


def read_digits(path: Path) -> tuple[Tensor, Tensor]:
    """Read images, uint8 (N, 1, 28, 28), and labels (N,)."""
    dataset = open_dataset(DataConfig(source=str(path)), 28, 1)
    return dataset.read(torch.arange(dataset.shape[0])), torch.tensor(Dataset.from_parquet(str(path))["label"])


def main() -> None:
    """Train, test and save the classifier."""
    parser = argparse.ArgumentParser(description="Train the classifier of digits.")
    parser.add_argument("train", type=Path, help="MNIST's training images, a parquet file")
    parser.add_argument("test", type=Path, help="MNIST's test images, a parquet file")
    parser.add_argument("--out", type=Path, default=CLASSIFIER, help="a safetensors file")
    options = parser.parse_args()
    torch.manual_seed(0)
    images, labels = read_digits(options.train)
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    steps = EPOCHS * -(-len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for epoch in range(EPOCHS):
        for indices in torch.randperm(len(images)).split(BATCH_SIZE):
            loss = F.cross_entropy(model.logits(model(images[indices])), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {float(loss.detach()):.4f}")
    model.half().float().eval()
    images, labels = read_digits(options.test)
    with torch.no_grad():
        correct = model.logits(model(images)).argmax(1) == labels
    print(f"accuracy on {len(images)} test images: {float(correct.float().mean()):.4f}")
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, options.out)


if __name__ == "__main__":
    main()
