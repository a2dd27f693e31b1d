"""How good samples are: features, and distances between sets of images. Needs `pip install ddim[train]`."""
