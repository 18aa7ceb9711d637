"""A checkpoint opened and asked: continuous evaluation, features, replay of a step, generation for people."""
