"""Uses of a checkpoint: evaluation, continuous evaluation, generation, features, replay of a step."""
