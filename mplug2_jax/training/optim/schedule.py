"""Learning-rate schedules: optax's warm-up and cosine, and the release's with its quirks."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mplug2_jax.training.config import ScheduleConfig


def make_schedule(config: ScheduleConfig, peak: float, steps: int, grad_accum_steps: int = 1) -> optax.Schedule:
    """Return a group's learning rate at the optimizer's step 0, 1, ..., each of ``grad_accum_steps`` micro-batches."""
    if config.kind == "cosine":
        warmup = min(config.warmup_steps, max(steps - 1, 0))
        return optax.warmup_cosine_decay_schedule(config.init_lr, peak, warmup, max(steps, warmup + 1), config.end_lr)
    warmup, init, end = config.warmup_steps, config.init_lr, config.end_lr
    length = steps * grad_accum_steps - 200  # the release subtracts 200 whatever its warm-up

    def rate_at(step: Int[Array, ""]) -> Float[Array, ""]:
        after = step - warmup
        cosine = end + 0.5 * (peak - end) * (1.0 + jnp.cos(jnp.pi * after / length))
        decayed = jnp.where(after >= length, end, cosine)
        return jnp.where(step < warmup, init + step * (peak - init) / warmup, decayed)

    def released(step: Int[Array, ""]) -> Float[Array, ""]:
        micro = step * grad_accum_steps + grad_accum_steps - 1  # the optimizer acts on the last of them
        previous = jnp.maximum(micro - 1, 0)
        if config.kind == "released_caption":
            dips = (previous % 100 == 0) & (previous <= 20000) & (previous < config.steps_per_epoch * grad_accum_steps)
            previous = jnp.where(dips, previous // 100, previous)
        return jnp.where(micro == 0, init, rate_at(previous))

    return released
