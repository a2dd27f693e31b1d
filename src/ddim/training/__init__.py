"""Training as in DDPM: configuration, data, checkpoints and the loop. Needs `pip install ddim[train]`."""
