"""`python -m ddim`: the same as the command `ddim`."""

from ddim.cli import main

main()
