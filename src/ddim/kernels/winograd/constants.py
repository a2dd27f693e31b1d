"""The matrices of Winograd's F(4x4, 3x3) (arXiv 1509.09308), and the sizes that follow from them.

The interpolation points are 0, 1, -1, 2, -2 and infinity, one per row of B^T and G.
"""

TILE_OUTPUT = 4
"""Height and width of a tile of results."""
TILE_INPUT = TILE_OUTPUT + 2
"""Height and width of the input that a tile depends on, with a 3x3 filter."""
POINTS = TILE_INPUT * TILE_INPUT
"""Numbers of a transformed tile, or of a transformed filter."""

CHANNEL_MULTIPLE = 8
"""Input channels come in multiples of it: one AVX register."""

BT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
AT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
