"""A run on this rank: its parts, its training step, and the order of its events."""
