"""`python -m arcee_mlx.lm <command> ...`: mlx-lm's command line, with Arcee known to it."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
