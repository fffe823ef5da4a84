"""The step as a draft while passes write it, and as a plan of stages when it runs."""
