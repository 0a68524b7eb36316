"""Faults by the hundred against real jobs: `python -m tests.faults`, or `make faults`."""
