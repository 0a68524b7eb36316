"""The whole of one run: the job, its plan, the driver loop and what it reports."""
