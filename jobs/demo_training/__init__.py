"""Trains the demo checkpoint: a small T5Gemma2 on the documentation that every Python has."""
