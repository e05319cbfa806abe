"""Weights on disk: the hub layout, streamed reading and writing, training state, export."""
