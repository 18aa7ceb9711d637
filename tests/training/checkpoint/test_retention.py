"""Which checkpoints are kept: the union of the rules, always with the newest."""

import datetime
from collections.abc import Iterable, Mapping
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.training.checkpoint.retention import BestByScore, preservation_policy
from mplug2_jax.training.config import CheckpointConfig

STEPS = range(1, 11)
START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def kept_steps(config: CheckpointConfig, scores: Mapping[int, float], steps: Iterable[int] = STEPS) -> set[int]:
    """Ask as Orbax does, for checkpoints that were saved a minute apart."""
    infos = [SimpleNamespace(step=s, time=START + s * datetime.timedelta(minutes=1), metrics=None) for s in steps]
    best = BestByScore(config)
    best.scores = scores
    kept = preservation_policy(config, best).should_preserve(infos, context=None)
    return {info.step for info, keep in zip(infos, kept, strict=True) if keep}


def test_each_rule_keeps_its_own_checkpoints() -> None:
    scores = {step: float(step) for step in (1, 2, 5)}
    assert kept_steps(CheckpointConfig(keep_last=2), scores) == {9, 10}
    assert kept_steps(CheckpointConfig(keep_last=1, keep_best=2), scores) == {1, 2, 10}
    assert kept_steps(CheckpointConfig(keep_last=1, keep_best=1, best_mode="max"), scores) == {5, 10}
    assert kept_steps(CheckpointConfig(keep_last=1, keep_best=20), scores) == {1, 2, 5, 10}
    assert kept_steps(CheckpointConfig(keep_last=1, keep_every_steps=4), {}) == {4, 8, 10}
    assert kept_steps(CheckpointConfig(keep_last=1, keep_every_minutes=3.0), {}) == {1, 4, 7, 10}


def test_of_equal_scores_the_later_step_is_the_best() -> None:
    for mode in ("min", "max"):
        assert kept_steps(CheckpointConfig(keep_last=1, keep_best=1, best_mode=mode), {2: 1.0, 4: 1.0}) == {4, 10}


@given(
    st.sets(st.integers(0, 50), min_size=1), st.dictionaries(st.integers(0, 50), st.floats(-1, 1)), st.integers(1, 4),
    st.integers(0, 3), st.sampled_from(["min", "max"]),
)  # fmt: skip
def test_the_newest_and_the_best_by_score_are_kept(
    steps: set[int], scores: dict[int, float], last: int, best: int, mode: str
) -> None:
    sign = 1 if mode == "min" else -1
    ranked = sorted(steps & scores.keys(), key=lambda step: (sign * scores[step], -step))
    expected = {*sorted(steps)[-last:], *ranked[:best]}
    config = CheckpointConfig(keep_last=last, keep_best=best, best_mode=mode)  # type: ignore[arg-type]
    assert kept_steps(config, scores, sorted(steps)) == expected
