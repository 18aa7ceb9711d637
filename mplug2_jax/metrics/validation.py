"""Checks of a metric's inputs."""

from mplug2_jax.errors import UserError


def check_same_length(metric: str, **counts: int) -> None:
    """Check that all inputs of a metric have the same length, and are not empty.

    Raises:
        UserError: names the metric and the lengths.
    """
    lengths = " and ".join(f"{count:,} {name}" for name, count in counts.items())
    if len(set(counts.values())) > 1:
        raise UserError(f"{metric}: found {lengths}; expected one of each for every example, in the same order")
    if not all(counts.values()):
        raise UserError(f"{metric}: found {lengths}; expected at least one example")
