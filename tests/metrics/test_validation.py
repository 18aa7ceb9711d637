"""Checks before anything is scored."""

import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.metrics.validation import check_same_length


def test_lengths_must_be_equal_and_not_0():
    check_same_length("ROUGE", summaries=2, references=2)
    with pytest.raises(
        UserError, match="ROUGE: found 1,000 summaries and 2 references; expected one of each for every"
    ):
        check_same_length("ROUGE", summaries=1000, references=2)
    with pytest.raises(UserError, match="ROUGE: found 0 summaries and 0 references; expected at least one example"):
        check_same_length("ROUGE", summaries=0, references=0)
