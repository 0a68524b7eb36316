"""Hundreds of faults against real jobs: `python -m tests.faults`, or `make faults`."""
