"""How good a checkpoint is, and what its neurons do: measured a layer at a time, so that size does not matter."""
