"""What happens to a table afterwards: verify, sync, truncate, delete, collect garbage."""
