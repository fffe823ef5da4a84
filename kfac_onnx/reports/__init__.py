"""What can be said of a model: why, inspect, diff, checks, golden numbers."""
