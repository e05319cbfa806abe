"""Ranks, process groups, and the exchange of expert rows between them."""
