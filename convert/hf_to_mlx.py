"""Converts a Hugging Face checkpoint to MLX: `python convert/hf_to_mlx.py --hf-path arcee-ai/AFM-4.5B`.

The same program as `arcee-mlx convert`; this file runs from a clone, installed or not. See README.md beside it.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("arcee_mlx") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arcee_mlx.conversion.command import DESCRIPTION, add_arguments, run
from arcee_mlx.program import run_program

if __name__ == "__main__":
    sys.exit(run_program("hf_to_mlx.py", DESCRIPTION, add_arguments, run))
