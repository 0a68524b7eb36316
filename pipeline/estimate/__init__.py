"""What encoding will take, from a sample, before anything is spent."""
