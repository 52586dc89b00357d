"""The benchmarks whose numbers the README quotes: `arcee-mlx bench` in command.py, each benchmark in a file of its own."""
