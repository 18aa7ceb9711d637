"""Predict memory, communication and step time of a run before it starts."""
