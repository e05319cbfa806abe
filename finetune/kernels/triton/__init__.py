"""Fast forms for GPUs, in Triton."""
