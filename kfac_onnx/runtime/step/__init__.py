"""One training step: stages, buffers, skips."""
