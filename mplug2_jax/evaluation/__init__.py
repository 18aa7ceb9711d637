"""Evaluation on held-out data, on any mesh: predictions, metrics, samples and submissions."""
