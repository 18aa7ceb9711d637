"""The exceptions that people are meant to read, and the exit statuses that schedulers are meant to read."""

import difflib
import math
from collections.abc import Iterable

USER_ERROR = 2
"""Exit status: something the user can mend; starting again will not help."""
PREEMPTED = 75
"""Exit status (EX_TEMPFAIL): asked to end, the state is saved; start it again."""
STALLED = 79
"""Exit status: the watchdog ended a run that stood still; start it again."""


class UserError(Exception):
    """Something the user can mend. The command line prints it as one sentence and exits with status 2."""


class Preempted(Exception):
    """The run was asked to end, and did so in order. The command line exits with status 75: start it again."""


def check_range(
    field: str, value: float | int | None, least: float | int = -math.inf, most: float | int = math.inf
) -> None:
    """Checks ``least <= value <= most``; None, a field that is left open, passes.

    Raises:
        UserError: names the field, what was found and what is valid.
    """
    if value is None or least <= value <= most:
        return
    if most == math.inf:
        raise UserError(f"{field}={value} must be at least {least:g}")
    raise UserError(f"{field}={value} must be between {least:g} and {most:g}")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """The end of an error sentence: the nearest valid name, and all of them while they are few.

    Example:
        >>> did_you_mean("viscon", ["vision", "text"])
        "did you mean 'vision'? (valid: text, vision)"
    """
    valid = sorted(choices)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    listing = f"valid: {', '.join(valid)}" if len(valid) <= 30 else f"{len(valid)} valid names"
    return f"did you mean '{near[0]}'? ({listing})" if near else listing
