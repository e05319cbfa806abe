"""Routing measures, health rules and sinks; independent of the trainer and of ranks."""
