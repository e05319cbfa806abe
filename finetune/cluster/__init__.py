"""Hosts, schedulers, launchers and GPUs."""
