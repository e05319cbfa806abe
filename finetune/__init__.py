"""The framework: recipe, model, engine, training loop, checkpoints. Runs from its checkout; nothing is installed."""
