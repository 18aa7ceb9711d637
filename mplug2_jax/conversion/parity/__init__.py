"""Golden numbers of the official release beside our own and the PyTorch runtime's, array by array."""
