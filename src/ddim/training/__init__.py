"""Training as in DDPM: configuration, checkpoints and the training loop. Requires `pip install ddim[train]`."""
