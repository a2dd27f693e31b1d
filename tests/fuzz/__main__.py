"""`python -m tests.fuzz`."""

import os
import sys
from pathlib import Path

TESTS = str(Path(__file__).parents[1])
sys.path.insert(0, TESTS)
# The server that forks workers looks for modules there; commands are checked in forks, which threads do not survive.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))
os.environ["OMP_NUM_THREADS"] = "1"

from fuzz.campaign import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
