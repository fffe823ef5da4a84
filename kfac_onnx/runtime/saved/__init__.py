"""What a run leaves on disk: checkpoints, exported weights."""
