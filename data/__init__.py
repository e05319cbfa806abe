"""From text to packed tensors. Holds code and the embedded corpus; users' datasets belong elsewhere."""
