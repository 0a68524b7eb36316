"""Estimates what encoding a corpus will take, from a sample of it, before anything is spent."""
