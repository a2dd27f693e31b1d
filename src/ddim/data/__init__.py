"""Training and evaluation data: where images come from, and how they are decoded, cropped and batched."""
