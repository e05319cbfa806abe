"""A run on this rank: what it is made of, and the order of its events."""
