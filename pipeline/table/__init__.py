"""Fragment to commit to sealed table: who may write, what is done, and when it is complete."""
