"""Forms for a CPU with backward passes of their own, in plain torch."""
