"""The check for a GPU; README.md says how to run it on a machine that has only torch."""
