"""How other projects name their tensors, and which of our parameters each one fills."""
