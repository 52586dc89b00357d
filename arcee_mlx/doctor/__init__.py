"""`arcee-mlx doctor`: is this installation sound?"""
