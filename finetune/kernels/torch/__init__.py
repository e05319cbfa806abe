"""Forms in plain torch for every device."""
