"""`python -m jobs` is `kalm`."""

from jobs.cli import main

main()
