"""The run folder, and how a run ends."""
