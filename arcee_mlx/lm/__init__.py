"""Importing `arcee_mlx.lm` makes `arcee` known to mlx-lm, before or after mlx_lm itself is imported.

Then `mlx_lm.load` and all that builds on it work on Arcee checkpoints. `python -m arcee_mlx.lm <command> ...` is
mlx-lm's command line with Arcee known to it.
"""

import sys

from . import awq, model

# mlx_lm finds a model type by importing this name; Python looks into sys.modules before it looks for a file.
sys.modules["mlx_lm.models.arcee"] = model
awq.register()
