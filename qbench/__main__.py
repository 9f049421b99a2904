"""`python -m qbench` is the console command `qbench`."""

from __future__ import annotations

import sys

from qbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
