"""Exceptions with messages for users, and exit statuses for schedulers."""

import difflib
import math
from collections.abc import Iterable

USER_ERROR = 2
"""Exit status: an error that the user has to fix; restarting does not help."""
PREEMPTED = 75
"""Exit status (EX_TEMPFAIL): preempted, with the state saved; restart to continue."""
UNAVAILABLE = 69
"""Exit status (EX_UNAVAILABLE): storage did not answer for too long; restart to continue."""
STALLED = 79
"""Exit status: the watchdog ended a stalled run; restart to continue."""
OUTPUT_CLOSED = 141
"""Exit status (128 + SIGPIPE): the reader closed stdout."""


class UserError(Exception):
    """An error that the user can fix. The command line prints its message and exits with status 2."""


class Preempted(Exception):
    """A run that saved its state on request and stopped. The command line exits with status 75: restart to continue."""


def check_range(
    field: str, value: float | int | None, minimum: float | int = -math.inf, maximum: float | int = math.inf
) -> None:
    """Check that ``minimum <= value <= maximum``; None, an unset field, passes.

    Raises:
        UserError: the value is out of range; the message names the field, the value and the range.
    """
    if value is None or minimum <= value <= maximum:
        return
    if maximum == math.inf:
        raise UserError(f"{field}={value} must be at least {minimum:g}")
    raise UserError(f"{field}={value} must be between {minimum:g} and {maximum:g}")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return the end of an error message: the closest valid name, and all valid names if there are few.

    Example:
        >>> did_you_mean("viscon", ["vision", "text"])
        "did you mean 'vision'? (valid: text, vision)"
    """
    valid = sorted(choices)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    listing = f"valid: {', '.join(valid)}" if len(valid) <= 35 else f"{len(valid)} valid names"
    return f"did you mean '{near[0]}'? ({listing})" if near else listing
