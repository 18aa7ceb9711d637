"""Other worlds' checkpoints and ours: name maps, loaders, and the proof that nothing was lost."""
