"""Fast forms for a CPU, in plain torch with hand-written backward passes."""
