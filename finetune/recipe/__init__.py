"""Recipes: every setting, reading a file, rules between settings, messages. Imports no torch."""
