"""Estimates memory, disk, operations and time of a run from its recipe and the model's sizes. Imports no torch."""
