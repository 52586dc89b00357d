"""`python -m arcee_mlx.generate`: the same program as `arcee-mlx generate`."""

import sys

from ..program import run_program
from . import command

if __name__ == "__main__":
    sys.exit(
        run_program(
            "python -m arcee_mlx.generate", "Write text with an Arcee model.", command.add_arguments, command.run
        )
    )
