"""Which checkpoints are kept: the newest, the best, one for each span of time, and every Nth for ever."""

from collections.abc import Mapping, Sequence
from typing import Any

from mplug2_jax.training.config import CheckpointConfig


def kept(config: CheckpointConfig, times: Mapping[int, float], scores: Mapping[int, float]) -> set[int]:
    """The steps to keep, of those that are there; what is not kept is deleted.

    The newest are kept whatever their scores: a run whose metric gets worse must still be able to go on.

    Args:
        config: how many of each.
        times: of the checkpoints, by step, in seconds.
        scores: the metric ``config.best_metric`` by step; a step without one is not among the best.
    """
    steps = sorted(times)
    keep = set(steps[-config.keep_last :])
    if config.keep_best:
        sign = 1 if config.best_mode == "min" else -1
        keep |= set(sorted((s for s in steps if s in scores), key=lambda s: (sign * scores[s], -s))[: config.keep_best])
    if config.keep_every_steps:
        keep |= {step for step in steps if step % config.keep_every_steps == 0}
    if config.keep_every_minutes:
        last = -float("inf")
        for step in steps:  # the first of each span; the spans begin anew at it
            if times[step] - last >= 60 * config.keep_every_minutes:
                keep.add(step)
                last = times[step]
    return keep


class Retention:
    """The same as Orbax asks for it. ``scores`` are renewed before every save."""

    def __init__(self, config: CheckpointConfig) -> None:
        self._config = config
        self.scores: Mapping[int, float] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Whether each checkpoint is kept."""
        del context
        keep = kept(self._config, {int(c.step): c.time.timestamp() for c in checkpoints}, self.scores)
        return [int(checkpoint.step) in keep for checkpoint in checkpoints]
