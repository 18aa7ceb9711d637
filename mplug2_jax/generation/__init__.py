"""Decoding: beam search, sampling, constrained answers and answer ranking, under jit, with a key-value cache."""
