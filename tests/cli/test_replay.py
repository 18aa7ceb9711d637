"""The verdict of ``mplug2 replay`` on a recomputed step."""

import math

import pytest

from mplug2_jax.cli.replay import describe_changes, verdict
from mplug2_jax.inference.replay import ReplayedStep
from mplug2_jax.training.config_changes import ConfigChange


@pytest.mark.parametrize(
    ("metrics", "recorded", "expected", "mismatched"),
    [
        ({"loss": 2.0, "norm": 1.0}, {"loss": 2.0, "norm": 1.0}, "all 2 metrics equal", []),
        ({"loss": 2.0, "norm": 1.0000001}, {"loss": 2.0, "norm": 1.0}, "1 of 2 metrics equal", []),
        ({"loss": 2.1, "norm": 1.0}, {"loss": 2.0, "norm": 1.0}, "1 of 2 metrics differ: loss", ["loss"]),
        ({"loss": 1e-9}, {"loss": 0.0}, "1 of 1 metrics differ: loss", ["loss"]),
        ({"loss": math.nan}, {"loss": None}, "all 1 metrics equal the recorded ones bit for bit", []),
        ({"loss": math.nan}, {"loss": 2.0}, "1 of 1 metrics differ: loss", ["loss"]),
        ({"loss": 2.0}, {}, "metrics.jsonl has no line of this step to compare with", []),
    ],
)  # fmt: skip
def test_rounding_is_distinguished_from_mismatches(
    metrics: dict[str, float], recorded: dict[str, float | None], expected: str, mismatched: list[str]
) -> None:
    replayed = ReplayedStep(3, 2, 2, metrics, recorded, [])
    assert verdict(replayed).startswith(expected)
    assert replayed.mismatched == mismatched


def test_changes_of_the_config_since_the_step_are_printed() -> None:
    change = ConfigChange("optimizer.learning_rate", "training", True, {"old": 0.1, "new": 0.2})
    assert describe_changes([change]).endswith("config.optimizer.learning_rate was 0.1 and is 0.2 now")
