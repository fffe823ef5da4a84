"""Every rewrite towards the canonical form of a training graph."""
