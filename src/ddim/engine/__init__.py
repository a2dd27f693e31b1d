"""How a U-Net is run fast: the same weights and, to rounding, the same numbers, in less time."""
