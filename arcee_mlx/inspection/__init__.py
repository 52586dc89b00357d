"""What a checkpoint is and what is wrong with it, without loading it: `inspect_checkpoint`, `arcee-mlx inspect`."""
