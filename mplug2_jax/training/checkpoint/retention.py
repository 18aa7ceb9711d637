"""Choose which checkpoints to keep: Orbax's policies, the best ranked by metrics that are known after the save."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, EveryNSeconds, EveryNSteps, LatestN

from mplug2_jax.training.config import CheckpointConfig


class BestByScore(BestN):
    """Orbax's ``BestN`` with ``scores`` by step, to be set before every save; a step without one is never the best."""

    def __init__(self, config: CheckpointConfig) -> None:
        super().__init__(n=config.keep_best, get_metric_fn=float, reverse=config.best_mode == "min")
        self.scores: Mapping[int, float] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return for each checkpoint whether to keep it."""
        scored = [SimpleNamespace(step=info.step, metrics=self.scores.get(int(info.step))) for info in checkpoints]
        best = super().should_preserve(scored, context=context)
        return [keep and info.metrics is not None for keep, info in zip(best, scored, strict=True)]


def preservation_policy(config: CheckpointConfig, best: BestByScore) -> AnyPreservationPolicy:
    """Return the policy that keeps what any rule of the config keeps; Orbax deletes the other checkpoints.

    The newest are kept whatever their scores: a run whose metric gets worse must still be able to resume.
    """
    rules = [LatestN(config.keep_last), best]
    if config.keep_every_steps:
        rules.append(EveryNSteps(config.keep_every_steps))
    if config.keep_every_minutes:
        rules.append(EveryNSeconds(60 * config.keep_every_minutes))
    return AnyPreservationPolicy(rules)
