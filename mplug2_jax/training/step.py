"""One training step: a batch of every stream in, one update out, in one compiled program."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mplug2_jax.model.mplug2 import Params
from mplug2_jax.model.prng import random_key
from mplug2_jax.objectives.cider import DocumentFrequencies
from mplug2_jax.objectives.ema import ema_update
from mplug2_jax.objectives.forward import DeviceBatch, ForwardPass, Metrics, named_key
from mplug2_jax.objectives.queue import Queue
from mplug2_jax.parallel.placement import replicated_sharding
from mplug2_jax.parallel.sharding import all_gather_param, assume_params_gathered, reduce_scatter_grad
from mplug2_jax.tasks.table import TASKS
from mplug2_jax.training.compilation import aot_cache_miss_reason, compiler_options
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.optim.lora import merge_adapters
from mplug2_jax.training.optim.partition import combine, partition
from mplug2_jax.training.state import RunSpec, TrainState

StreamBatches = Mapping[str, DeviceBatch]
Queues = dict[str, Queue]


def streams_loss(
    spec: RunSpec,
    params: Params,
    teacher: Params | None,
    queues: Queues,
    batches: StreamBatches,
    rng: PRNGKeyArray,
    alpha: Float[Array, ""],
    frequencies: DocumentFrequencies | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, Queues]]:
    """The weighted sum of all streams' objectives, their metrics, and the queues with these batches in them."""
    config = spec.config
    model = spec.definition.bind(merge_adapters(params, config.lora.scale))
    teaching = None if teacher is None else spec.definition.bind(jax.lax.stop_gradient(teacher))
    total, queues = jnp.zeros(()), dict(queues)
    metrics: Metrics = {}
    for name, stream in config.streams.items():
        key = named_key(rng, name)
        taught = None if teaching is None else ForwardPass(teaching, batches[name], named_key(key, "teacher"))
        forward = ForwardPass(
            model, batches[name], key, teacher=taught, alpha=alpha, queue=queues.get(name), frequencies=frequencies
        )
        for objective, weight in stream.objectives.items():
            loss = TASKS[objective].loss
            assert loss is not None  # as the config has checked
            outcome = loss(forward, spec.context)
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


def micro_batches(batches: StreamBatches, count: int) -> StreamBatches:
    """Every array as [count, rows / count, ...]; each micro-batch takes its rows from every device."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), batches)


class StepInputs(NamedTuple):
    """What a step's losses depend on besides parameters, queues and batches."""

    rng: PRNGKeyArray
    teacher: Params | None
    alpha: Float[Array, ""]
    frequencies: DocumentFrequencies | None


def step_inputs(spec: RunSpec, state: TrainState) -> StepInputs:
    """The step's randomness, and its teacher: moved first and then asked, as in the release."""
    config, teacher = spec.config, state.get("teacher")
    distillation = config.tasks.distillation
    if teacher is not None and distillation is not None:
        student = merge_adapters(state["params"], config.lora.scale)
        teacher = ema_update(teacher, student, distillation.momentum, frozen=distillation.frozen)
    rng = jax.random.fold_in(random_key(config.seed), state["step"])
    return StepInputs(rng, teacher, _alpha(config, state["step"]), state.get("frequencies"))


def train_step(spec: RunSpec, state: TrainState, batches: StreamBatches) -> tuple[TrainState, Metrics]:
    """(state, batches) -> (state, metrics). Pure; its randomness is a function of (seed, step)."""
    config = spec.config
    params, frozen = partition(state["params"], config.frozen)
    rng, teacher, alpha, frequencies = step_inputs(spec, state)

    once = config.fsdp_gather == "step"
    axes, frozen_axes = partition(spec.logical_axes, config.frozen)
    used = jax.tree.map(all_gather_param, params, axes) if once else params
    rest = jax.tree.map(all_gather_param, frozen, frozen_axes) if once else frozen
    teaches = jax.tree.map(all_gather_param, teacher, spec.definition.axes) if once and teacher is not None else teacher

    def loss(params: Params, queues: Queues, batches: StreamBatches, rng: PRNGKeyArray) -> Any:
        with assume_params_gathered() if once else contextlib.nullcontext():
            return streams_loss(spec, combine(params, rest), teaches, queues, batches, rng, alpha, frequencies)

    def gradient_of(queues: Queues, batches: StreamBatches, rng: PRNGKeyArray) -> tuple[Metrics, Queues, Params]:
        (_, (metrics, queues)), gradients = jax.value_and_grad(loss, has_aux=True)(used, queues, batches, rng)
        return metrics, queues, jax.tree.map(reduce_scatter_grad, gradients, axes) if once else gradients

    queues = state.get("queues", {})
    if config.grad_accum_steps == 1:
        metrics, queues, gradients = gradient_of(queues, batches, rng)
    else:
        count = config.grad_accum_steps

        def add(carry: Any, micro: Any) -> tuple[Any, Metrics]:
            total, queues = carry
            batches, i = micro
            metrics, queues, gradients = gradient_of(queues, batches, jax.random.fold_in(rng, i))
            return (jax.tree.map(lambda t, g: t + g / count, total, gradients), queues), metrics

        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
        micro = (micro_batches(batches, count), jnp.arange(count))
        (gradients, queues), each = jax.lax.scan(add, (zeros, queues), micro)
        metrics = jax.tree.map(lambda m: m.mean(0), each)

    gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
    moments = (
        jax.device_put(state["opt"], spec.device_shardings["opt"]) if config.optimizer.offload_moments else state["opt"]
    )
    with jax.named_scope("optimizer"):
        updates, opt = spec.optimizer.update(gradients, moments, params)
        moved = optax.apply_updates(params, updates)
        after: TrainState = {"params": combine(moved, frozen), "opt": opt}
        if "ema" in state:
            exact = jax.tree.map(lambda p: p.astype(jnp.float32), moved)
            after["ema"] = ema_update(state["ema"], exact, config.ema_decay)
    if teacher is not None:
        after["teacher"] = teacher
    if queues:
        after["queues"] = queues
    if frequencies is not None:
        after["frequencies"] = frequencies
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    # A step that is not finite changes nothing but the count. Loss and norm are the same on all devices, so all skip.
    before = {**state, "opt": moments}
    after = {name: _chosen(finite, new, before[name]) for name, new in after.items()} | {"step": state["step"] + 1}
    metrics |= {"gradient_norm": norm, "skipped": 1 - finite.astype(jnp.int32)}
    metrics |= {f"gradient_norm/{part}": optax.tree.norm(tree) for part, tree in gradients.items()}
    # Of the new ones: asking the old ones would keep them alive beside the new.
    metrics |= {f"parameter_norm/{part}": optax.tree.norm(tree) for part, tree in after["params"].items()}
    if "contrastive" in state["params"]:
        metrics["temperature"] = state["params"]["contrastive"]["temperature"]
    metrics |= {f"learning_rate/{group}": rate(_updates(moments)) for group, rate in spec.schedules.items()}
    return after, metrics


def _chosen(finite: Bool[Array, ""], new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def _updates(opt: optax.OptState) -> Int[Array, ""]:
    """The updates that were made, which is what schedules count: fewer than steps where some were skipped."""
    adam = [s for s in jax.tree.leaves(opt, is_leaf=_is_adam) if _is_adam(s)]
    return adam[0].count


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


class Step:
    """(state, batches) -> (state, metrics) under jit: the state is donated, and stays where it was."""

    def __init__(self, jitted: Any, mesh: Mesh) -> None:
        self._jitted, self._mesh = jitted, mesh
        self.cache_miss_reason: str | None = (
            None  # and not taken as it was compiled ahead; empty: it was; None: it was not
        )
        self._call: Callable[[TrainState, StreamBatches], tuple[TrainState, Metrics]] = jitted

    def trace(self, state: TrainState, batches: StreamBatches) -> Any:
        """Trace the step: what :meth:`compile` takes, with its ``jaxpr``."""
        with jax.set_mesh(self._mesh):
            return self._jitted.trace(state, batches)

    def compile(self, traced: Any) -> dict[str, int]:
        """Compile before the first call; return the bytes of each device's memory that the program needs, by use."""
        devices = self._mesh.devices.ravel().tolist()
        with jax.set_mesh(self._mesh):
            lowered = traced.lower()
            self.cache_miss_reason = aot_cache_miss_reason(lowered, devices)
            compiled = lowered.compile(compiler_options(devices[0].platform))
        self._call = compiled
        analysis = compiled.memory_analysis()
        uses = ("argument", "output", "alias", "temp", "generated_code")
        return {use: int(getattr(analysis, f"{use}_size_in_bytes")) for use in uses} if analysis else {}

    def __call__(self, state: TrainState, batches: StreamBatches) -> tuple[TrainState, Metrics]:
        """One step; the old state is gone."""
        with jax.set_mesh(self._mesh):
            return self._call(state, batches)


def jit_train_step(spec: RunSpec) -> Any:
    """The step under ``jax.jit``, to be called or lowered with the mesh in context; the state is donated."""
    return jax.jit(
        lambda state, batches: train_step(spec, state, batches),
        donate_argnums=0,
        out_shardings=(spec.shardings, replicated_sharding(spec.mesh)),
    )


def make_step(spec: RunSpec) -> Step:
    """The step of a run, compiled when it is first called or when asked to."""
    return Step(jit_train_step(spec), spec.mesh)
