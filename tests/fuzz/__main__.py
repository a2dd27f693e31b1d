"""`python -m tests.fuzz`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
# Commands are checked in forks, which threads do not survive.
os.environ["OMP_NUM_THREADS"] = "1"

from fuzz.campaign import main

if __name__ == "__main__":
    sys.exit(main())
