"""How to search for what is said."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from mplug2_jax.errors import check_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How to search. Lengths count generated tokens: the begin token is not one, the end token is.

    With ``extend_finished``, finished beams are extended beyond their end token, and when an example is done all its
    beams are stored, finished or not, as in the release (its ``TextGenerator``).

    With ``top_p`` above 0 there is no search: ``num_beams`` sequences are sampled from the nucleus that holds that much
    probability, at ``temperature``.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"beams": "num_beams"}
    num_beams: int = 5  # at least 1; 1: greedy
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
        for name, least in (("num_beams", 1), ("min_length", 0), ("max_length", 1)):
            check_range(f"config.tasks.search.{name}", getattr(self, name), least)
        check_range("config.tasks.search.top_p", self.top_p, 0, 1)
        check_range("config.tasks.search.temperature", self.temperature, 1e-3, 1e3)
