"""Ids to rows, rows to states, states to scores: the reranker and its cascade."""
