"""Command line of kalm-preencode: one module a command, cli.py joins them."""
