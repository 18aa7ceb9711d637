"""Convert checkpoints of other projects to ours and back, and verify the result."""
