"""Hosts, schedulers and cards, from the standard library alone."""
