"""Training objectives: pure functions of one batch's forward pass, each returning a loss and metrics."""
