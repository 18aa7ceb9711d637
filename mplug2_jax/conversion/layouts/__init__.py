"""The names that other worlds give their tensors, and the place of each in our parameter tree."""
