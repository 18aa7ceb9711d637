"""Compare golden numbers of the official release with our model's and the PyTorch runtime's, array by array."""
