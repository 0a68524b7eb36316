"""Text to token states, and a query with stored states to scores: both halves of the model."""
