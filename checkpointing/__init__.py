"""What survives a crash: checkpoints, and files of weights."""
