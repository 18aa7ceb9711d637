"""Files of named tensors, read and written one tensor at a time, and atomic outputs."""
