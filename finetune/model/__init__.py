"""Single-device mathematics of the hybrid mixture-of-experts model: no ranks, no recipe."""
