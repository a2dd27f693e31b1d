"""Constants that the binding and the source of `ddim.kernels.conv_grad` share."""

TILE_LANES = 16
"""Input channels and output channels of a tile of the weights' gradient: both are multiples of it."""
