"""Training: configuration, data, the loop, checkpoints, and what comes out."""
