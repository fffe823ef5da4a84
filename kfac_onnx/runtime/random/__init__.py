"""Random numbers by seed and step."""
