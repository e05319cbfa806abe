"""Text in, packed tensors out. Code and the embedded corpus only: your own datasets live elsewhere."""
