"""Scores, by well-kept libraries where there are any. Pure functions of lists and arrays on the host."""
