"""`python -m starkv_compile` runs the command `starkv`, also if its script is not on the PATH."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
