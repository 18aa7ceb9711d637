"""Files of named tensors, read and written one tensor at a time, and outputs that appear whole or not at all."""
