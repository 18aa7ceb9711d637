"""What replay says of a step that was made again."""

import math

import pytest

from mplug2_jax.cli.replay import verdict
from mplug2_jax.inference.replay import ReplayedStep


@pytest.mark.parametrize(
    ("again", "recorded", "said", "wrong"),
    [
        ({"loss": 2.0, "norm": 1.0}, {"loss": 2.0, "norm": 1.0}, "all 2 metrics equal", []),
        ({"loss": 2.0, "norm": 1.0000001}, {"loss": 2.0, "norm": 1.0}, "1 of 2 metrics equal", []),
        ({"loss": 2.1, "norm": 1.0}, {"loss": 2.0, "norm": 1.0}, "1 of 2 metrics differ: loss", ["loss"]),
        ({"loss": 1e-9}, {"loss": 0.0}, "1 of 1 metrics differ: loss", ["loss"]),
        ({"loss": math.nan}, {"loss": None}, "all 1 metrics equal the recorded ones, bit for bit", []),
        ({"loss": math.nan}, {"loss": 2.0}, "1 of 1 metrics differ: loss", ["loss"]),
        ({"loss": 2.0}, {}, "metrics.jsonl has no line of this step to compare with", []),
    ],
)  # fmt: skip
def test_rounding_is_told_from_what_is_wrong(
    again: dict[str, float], recorded: dict[str, float | None], said: str, wrong: list[str]
) -> None:
    found = ReplayedStep(3, 2, 2, again, recorded, [])
    assert verdict(found).startswith(said)
    assert found.wrong == wrong
