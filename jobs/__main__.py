"""`python -m jobs` is `kalm`."""

from kalm_encoder.command import main

main()
