"""Evaluation of samples: features of images, and distances between sets of them. Requires `pip install ddim[train]`."""
