"""Recipes of fine-tuning: one module per family of tasks, and ``api.py``, which ``configs/`` imports."""
