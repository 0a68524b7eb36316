"""Benchmarks: `make bench` runs them; results go into docs/benchmarks.md by hand."""
