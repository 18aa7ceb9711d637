"""A training run: config, state, step, initialization, compilation, work directory; start at loop.py."""
