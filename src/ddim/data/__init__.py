"""Images for training and evaluation: where they come from, and how they are decoded, cropped, cached and batched."""
