"""Checkpoints: saved by Orbax with the data position, verified by checksums, thinned out by a retention policy."""
