"""Search over the decoder's outputs: beams and answer ranking, under jit, with a key-value cache."""
