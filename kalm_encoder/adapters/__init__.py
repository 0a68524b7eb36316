"""The reranker as other frameworks call it."""
