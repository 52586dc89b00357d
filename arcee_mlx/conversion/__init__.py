"""Hugging Face checkpoints become MLX checkpoints: `convert` in run.py, as a command in command.py."""
