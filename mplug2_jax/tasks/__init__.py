"""A task in each file; ``contracts`` has what they need and read, ``table`` what they do."""
