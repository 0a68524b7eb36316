"""Benchmarks: `make bench` runs them all; results go into RESULTS.md by hand, with the date."""
