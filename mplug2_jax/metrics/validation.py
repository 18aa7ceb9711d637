"""What is scored and what it is scored by belong together."""

from mplug2_jax.errors import UserError


def check_same_length(metric: str, **counts: int) -> None:
    """Checks that there are as many of one as of the other, and any at all.

    Raises:
        UserError: names the metric and what was found.
    """
    found = " and ".join(f"{count:,} {name}" for name, count in counts.items())
    if len(set(counts.values())) > 1:
        raise UserError(f"{metric}: found {found}; every example needs one of each, in the same order")
    if not all(counts.values()):
        raise UserError(f"{metric}: found {found}; there must be an example to score")
