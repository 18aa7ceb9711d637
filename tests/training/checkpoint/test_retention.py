"""Which checkpoints are kept: rules that add up, and the newest in any case."""

from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.training.checkpoint.retention import kept
from mplug2_jax.training.config import CheckpointConfig

TIMES = {step: 60.0 * step for step in range(1, 11)}  # one a minute


def test_each_rule_keeps_its_own() -> None:
    scores = {step: float(step) for step in (1, 2, 5)}
    assert kept(CheckpointConfig(keep_last=2), TIMES, scores) == {9, 10}
    assert kept(CheckpointConfig(keep_last=1, keep_best=2), TIMES, scores) == {1, 2, 10}
    assert kept(CheckpointConfig(keep_last=1, keep_best=1, best_mode="max"), TIMES, scores) == {5, 10}
    assert kept(CheckpointConfig(keep_last=1, keep_every_steps=4), TIMES, {}) == {4, 8, 10}
    assert kept(CheckpointConfig(keep_last=1, keep_every_minutes=3.0), TIMES, {}) == {1, 4, 7, 10}


@given(
    st.sets(st.integers(0, 50), min_size=1), st.dictionaries(st.integers(0, 50), st.floats(-1, 1)), st.integers(1, 4),
    st.integers(0, 3),
)  # fmt: skip
def test_the_newest_is_always_kept_and_nothing_is_kept_that_is_not_there(
    steps: set[int], scores: dict[int, float], keep: int, best: int
) -> None:
    found = kept(CheckpointConfig(keep_last=keep, keep_best=best), dict.fromkeys(steps, 0.0), scores)
    assert max(steps) in found
    assert found <= steps
    assert len(found) <= keep + best
