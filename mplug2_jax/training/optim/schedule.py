"""Learning-rate schedules: ours from optax, and the release's with its quirks."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mplug2_jax.training.config import ScheduleConfig


def make_schedule(config: ScheduleConfig, peak: float, steps: int, accumulate: int = 1) -> optax.Schedule:
    """The learning rate of a group at the optimiser's step 0, 1, ..., each of ``accumulate`` micro-batches."""
    if config.kind == "cosine":
        warmup = min(config.warmup_steps, max(steps - 1, 0))
        return optax.warmup_cosine_decay_schedule(config.init_lr, peak, warmup, max(steps, warmup + 1), config.end_lr)
    warmup, init, end = config.warmup_steps, config.init_lr, config.end_lr
    length = steps * accumulate - 200  # the release subtracts 200 whatever its warm-up

    def at(step: Int[Array, ""]) -> Float[Array, ""]:
        after = step - warmup
        down = end + 0.5 * (peak - end) * (1.0 + jnp.cos(jnp.pi * after / length))
        decayed = jnp.where(after >= length, end, down)
        return jnp.where(step < warmup, init + step * (peak - init) / warmup, decayed)

    def in_force(step: Int[Array, ""]) -> Float[Array, ""]:
        micro = step * accumulate + accumulate - 1  # the optimiser acts on the last of them
        called = jnp.maximum(micro - 1, 0)
        if config.kind == "released_caption":
            dips = (called % 100 == 0) & (called <= 20000) & (called < config.steps_per_epoch * accumulate)
            called = jnp.where(dips, called // 100, called)
        return jnp.where(micro == 0, init, at(called))

    return in_force
