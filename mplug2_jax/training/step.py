"""One training step: a batch of every stream in, one update out, in one compiled program."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mplug2_jax.model.mplug2 import Params
from mplug2_jax.objectives.forward import DeviceBatch, Forward, Metrics, purpose_key
from mplug2_jax.objectives.queue import Queue
from mplug2_jax.objectives.teacher import update_teacher
from mplug2_jax.parallel.placement import replicated
from mplug2_jax.tasks import TASKS
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.state import Blueprint, TrainState

StreamBatches = Mapping[str, DeviceBatch]
Queues = dict[str, Queue]
Step = Callable[[TrainState, StreamBatches], tuple[TrainState, Metrics]]


def streams_loss(
    plan: Blueprint,
    params: Params,
    teacher: Params | None,
    queues: Queues,
    batches: StreamBatches,
    rng: PRNGKeyArray,
    alpha: Float[Array, ""],
) -> tuple[Float[Array, ""], tuple[Metrics, Queues]]:
    """The weighted sum of all streams' objectives, their metrics, and the queues with these batches in them."""
    config = plan.config
    model = plan.definition.bind(params)
    teaching = None if teacher is None else plan.definition.bind(jax.lax.stop_gradient(teacher))
    total, queues = jnp.zeros(()), dict(queues)
    metrics: Metrics = {}
    for name, stream in config.streams.items():
        key = purpose_key(rng, name)
        taught = None if teaching is None else Forward(teaching, batches[name], purpose_key(key, "teacher"))
        forward = Forward(model, batches[name], key, teacher=taught, alpha=alpha, queue=queues.get(name))
        for objective, weight in stream.objectives.items():
            outcome = TASKS[objective].loss(forward, plan.context)
            total += weight * outcome.loss
            metrics |= {f"{name}/{objective}/{what}": value for what, value in outcome.metrics.items()}
            if outcome.queue is not None:
                queues[name] = outcome.queue
    return total, ({"loss": total, **metrics}, queues)


def _alpha(config: RunConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """How much the teacher counts: a linear ramp, then constant."""
    distillation = config.tasks.distillation
    if distillation is None:
        return jnp.zeros(())
    return distillation.alpha * jnp.minimum(1.0, step / max(distillation.ramp_steps, 1))


def _micro_batches(batches: StreamBatches, count: int) -> StreamBatches:
    """Every array as [count, rows / count, ...]; each micro-batch takes its rows from every device."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), batches)


def train_step(plan: Blueprint, state: TrainState, batches: StreamBatches) -> tuple[TrainState, Metrics]:
    """(state, batches) -> (state, metrics). Pure; its randomness is a function of (seed, step)."""
    config, params = plan.config, state["params"]
    rng = jax.random.fold_in(jax.random.key(config.seed), state["step"])
    teacher = state.get("teacher")
    distillation = config.tasks.distillation
    if teacher is not None and distillation is not None:  # moved first and then asked, as in the release
        teacher = update_teacher(teacher, params, distillation.momentum, frozen=distillation.frozen)
    alpha = _alpha(config, state["step"])

    def loss(params: Params, queues: Queues, batches: StreamBatches, rng: PRNGKeyArray) -> Any:
        return streams_loss(plan, params, teacher, queues, batches, rng, alpha)

    gradient_of = jax.value_and_grad(loss, has_aux=True)
    queues = state.get("queues", {})
    if config.accumulate == 1:
        (_, (metrics, queues)), gradients = gradient_of(params, queues, batches, rng)
    else:
        count = config.accumulate

        def add(carry: Any, micro: Any) -> tuple[Any, Metrics]:
            total, queues = carry
            batches, i = micro
            (_, (metrics, queues)), gradients = gradient_of(params, queues, batches, jax.random.fold_in(rng, i))
            return (jax.tree.map(lambda t, g: t + g / count, total, gradients), queues), metrics

        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
        micro = (_micro_batches(batches, count), jnp.arange(count))
        (gradients, queues), each = jax.lax.scan(add, (zeros, queues), micro)
        metrics = jax.tree.map(lambda m: m.mean(0), each)

    gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
    moments = jax.device_put(state["opt"], plan.on_device["opt"]) if config.optimizer.offload else state["opt"]
    updates, opt = plan.optimizer.update(gradients, moments, params)
    after: TrainState = {"params": optax.apply_updates(params, updates), "opt": opt, "step": state["step"] + 1}
    if teacher is not None:
        after["teacher"] = teacher
    if queues:
        after["queues"] = queues
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    metrics |= {f"learning_rate/{group}": rate(state["step"]) for group, rate in plan.rates.items()}
    return after, metrics


def jitted_step(plan: Blueprint) -> Any:
    """The step under ``jax.jit``, to be called or lowered with the mesh in context; the state is donated."""
    return jax.jit(
        lambda state, batches: train_step(plan, state, batches),
        donate_argnums=0,
        out_shardings=(plan.shardings, replicated(plan.mesh)),
    )


def compile_step(plan: Blueprint) -> Step:
    """The step, ready to be called: the state is donated, and stays where it was."""
    jitted = jitted_step(plan)

    def step(state: TrainState, batches: StreamBatches) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(plan.mesh):
            return jitted(state, batches)

    return step
