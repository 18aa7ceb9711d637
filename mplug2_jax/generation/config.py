"""Settings of decoding."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from mplug2_jax.errors import check_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Beam search or sampling. Lengths count generated tokens: with the end token, without the begin token.

    With ``extend_finished``, finished beams are extended beyond their end token, and when an example is done all its
    beams are stored, finished or not, as in the release (its ``TextGenerator``).

    With ``top_p`` above 0 there is no search: ``num_beams`` sequences are sampled from the nucleus that holds that much
    probability, at ``temperature``.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"beams": "num_beams"}
    num_beams: int = 5  # at least 1; 1: greedy
    min_length: int = 1  # tokens
    max_length: int = 20  # tokens, at least 1
    extend_finished: bool = False  # beams continue beyond their end token, as in the release
    top_p: float = 0.0  # nucleus sampling, 0 to 1; 0: beam search
    temperature: float = 1.0  # of the sampling

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: names the field.
        """
        for name, minimum in (("num_beams", 1), ("min_length", 0), ("max_length", 1)):
            check_range(f"config.tasks.search.{name}", getattr(self, name), minimum)
        check_range("config.tasks.search.top_p", self.top_p, 0, 1)
        check_range("config.tasks.search.temperature", self.temperature, 1e-3, 1e3)
