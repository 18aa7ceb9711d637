"""Learning-rate schedules: warm-up and a decay by optax, and the release's with its quirks."""

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from mplug2_jax.training.config import ScheduleConfig

Rate = float | Float[Array | np.ndarray, ""]


def make_schedule(config: ScheduleConfig, peak: Rate, steps: int, grad_accum_steps: int = 1) -> optax.Schedule:
    """Return a group's learning rate at the optimizer's step 0, 1, ..., each of ``grad_accum_steps`` micro-batches."""
    if not config.kind.startswith("released"):
        warmup = min(config.warmup_steps, max(steps - 1, 0))
        rise, fall = optax.linear_schedule(config.init_lr, peak, warmup), _after_warmup(config, peak, warmup, steps)
        return optax.join_schedules([rise, fall], [warmup])
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


def _after_warmup(config: ScheduleConfig, peak: Rate, warmup: int, steps: int) -> optax.Schedule:
    """Return the rate of the steps after the warm-up, counted from its end."""
    remaining = max(steps - warmup, 1)
    match config.kind:
        case "cosine":
            fall = optax.cosine_decay_schedule(1.0, remaining)
            return lambda step: config.end_lr + (peak - config.end_lr) * fall(step)
        case "linear":
            return optax.linear_schedule(peak, config.end_lr, remaining)
        case "rsqrt":
            return lambda step: peak * (1.0 + step / max(warmup, 1)) ** -0.5
        case "wsd" if config.decay_steps:
            start = max(remaining - config.decay_steps, 0)
            return optax.linear_schedule(peak, config.end_lr, remaining - start, start)
        case _:
            return optax.constant_schedule(peak)
