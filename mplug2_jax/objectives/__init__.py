"""What the model is trained for: pure functions of one batch's forward pass, each returning (loss, metrics)."""
