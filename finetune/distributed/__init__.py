"""The ranks of a run and what they send each other."""
