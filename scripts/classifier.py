"""Train the classifier of digits whose features judge the built-in model.

    python scripts/classifier.py mnist/train.parquet mnist/test.parquet [--out mnist_classifier.safetensors]

Some minutes on one core. Prints the accuracy on the test set; the weights are stored in half precision.
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

EPOCHS, BATCH, RATE = 6, 128, 2e-3


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Images, uint8 (N, 1, 28, 28), and labels."""
    dataset = open_dataset(DataConfig(source=str(path)), 28, 1)
    return dataset.read(torch.arange(dataset.shape[0])), torch.tensor(Dataset.from_parquet(str(path))["label"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the classifier of digits.")
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--out", type=Path, default=CLASSIFIER)
    options = parser.parse_args()
    torch.manual_seed(0)
    images, labels = read(options.train)
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    steps = EPOCHS * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for epoch in range(EPOCHS):
        for indices in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(model.logits(model(images[indices])), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {float(loss.detach()):.4f}")
    model.half().float().eval()
    images, labels = read(options.test)
    with torch.no_grad():
        right = model.logits(model(images)).argmax(1) == labels
    print(f"accuracy on {len(images)} test images: {float(right.float().mean()):.4f}")
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, options.out)


if __name__ == "__main__":
    main()
