"""The embedding block of K-FAC: factors, blocks, presets."""
