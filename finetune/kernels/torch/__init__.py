"""Fast forms in plain torch, for every device."""
