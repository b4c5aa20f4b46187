"""Smaller or sparser models from a checkpoint: zeros, neurons, heads, layers, ranks."""
