"""Scores of predictions, by established libraries where there are any: pure functions on the host."""
