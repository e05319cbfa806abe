"""Numbers in, judgement out: routing measures, health rules, sinks. Knows nothing of the trainer or of ranks."""
