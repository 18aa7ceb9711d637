"""Exponential moving average of parameters: the momentum teacher, or the average for evaluation."""

from collections.abc import Collection

import jax

from mplug2_jax.model.mplug2 import Params


def ema_update(average: Params, params: Params, momentum: float, *, frozen: Collection[str] = ()) -> Params:
    """Compute momentum * average + (1 - momentum) * params, for the parts in ``average``.

    ``frozen`` names top-level parts that are not updated: the release never updates its teacher's fusion.
    """
    return {
        part: old
        if part in frozen
        else jax.tree.map(lambda a, p: momentum * a + (1.0 - momentum) * p, old, params[part])
        for part, old in average.items()
    }
