"""Training loops, checkpoints and logs."""
