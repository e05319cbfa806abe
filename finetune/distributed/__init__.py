"""The ranks of a run, their process groups and collectives, and the expert exchange."""
