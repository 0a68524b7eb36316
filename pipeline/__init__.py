"""Batch side: corpus files to a Lance passage table, on Ray or in this process."""
