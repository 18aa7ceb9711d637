"""The teacher, or an average for evaluation: an exponential moving average of the student's parameters."""

from collections.abc import Collection

import jax

from mplug2_jax.model.mplug2 import Params


def ema_update(teacher: Params, student: Params, momentum: float, *, frozen: Collection[str] = ()) -> Params:
    """Momentum * teacher + (1 - momentum) * student, for every part the teacher holds.

    ``frozen`` names top-level parts that stay as they are: the release never updates its teacher's fusion.
    """
    return {
        part: own
        if part in frozen
        else jax.tree.map(lambda t, s: momentum * t + (1.0 - momentum) * s, own, student[part])
        for part, own in teacher.items()
    }
