"""A run: its config, state, optimiser, step, checkpoints, telemetry, and the loop that tells the story."""
