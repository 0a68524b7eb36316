"""The HTTP service: one process, one device, one passage table."""
