"""How to search for what is said."""

import dataclasses

from mplug2_jax.errors import check_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How to search. Lengths count generated tokens: the begin token is not one, the end token is.

    With ``extend_finished`` beams that ended go on, beyond their end token, and when a clip is done all its beams are
    stored, ended or not: so the release (its ``TextGenerator``) searches.

    With ``top_p`` above 0 nothing is searched: ``beams`` sequences are drawn from the nucleus of that much probability,
    at ``temperature``.
    """

    beams: int = 5  # at least 1; 1: greedy
    min_length: int = 1  # tokens
    max_length: int = 20  # tokens, at least 1
    extend_finished: bool = False  # search as the release does
    top_p: float = 0.0  # 0 to 1; 0: search, nothing is drawn
    temperature: float = 1.0  # of what is drawn

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            UserError: names the field.
        """
        for name, least in (("beams", 1), ("min_length", 0), ("max_length", 1)):
            check_range(f"config.tasks.search.{name}", getattr(self, name), least)
        check_range("config.tasks.search.top_p", self.top_p, 0, 1)
        check_range("config.tasks.search.temperature", self.temperature, 1e-3, 1e3)
