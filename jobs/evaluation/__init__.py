"""Evaluation on the user's own judgements: settings, metrics, runs, reports."""
