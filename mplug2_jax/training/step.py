"""One training step: a batch of every stream in, one update out, in one compiled program."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mplug2_jax.model.mplug2 import Params
from mplug2_jax.model.prng import random_key
from mplug2_jax.objectives.cider import DocumentFrequencies
from mplug2_jax.objectives.ema import ema_update
from mplug2_jax.objectives.forward import DeviceBatch, ForwardPass, Metrics, named_key
from mplug2_jax.objectives.queue import Queue
from mplug2_jax.parallel.placement import replicated_sharding
from mplug2_jax.parallel.sharding import all_gather_param, assume_params_gathered, reduce_scatter_grad
from mplug2_jax.tasks.table import TASKS
from mplug2_jax.training.color_augment import augment_colors
from mplug2_jax.training.compilation import aot_cache_miss_reason, compiler_options
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.optim.lora import merge_adapters
from mplug2_jax.training.optim.partition import combine, partition
from mplug2_jax.training.state import Hyperparams, RunSpec, TrainState

StreamBatches = Mapping[str, DeviceBatch]
BatchSizes = tuple[tuple[str, int], ...]
Queues = dict[str, Queue]


def batch_sizes(batches: StreamBatches) -> BatchSizes:
    """Return the number of examples of each stream: a step has a program for each combination of them."""
    return tuple((name, len(next(iter(batches[name].values())))) for name in sorted(batches))


def streams_loss(
    spec: RunSpec, params: Params, teacher: Params | None, queues: Queues, batches: StreamBatches, rng: PRNGKeyArray,
    alpha: Float[Array, ""], frequencies: DocumentFrequencies | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, Queues]]:  # fmt: skip
    """Return the weighted sum of all streams' objectives, their metrics, and the queues with these batches added."""
    config = spec.config
    model = spec.model_def.bind(merge_adapters(params, config.lora.scale))
    teacher_model = None if teacher is None else spec.model_def.bind(jax.lax.stop_gradient(teacher))
    total, queues = jnp.zeros(()), dict(queues)
    metrics: Metrics = {}
    for name, stream in config.streams.items():
        key, batch = named_key(rng, name), augment_colors(batches[name])
        teacher_pass = None
        if teacher_model is not None:
            teacher_pass = ForwardPass(teacher_model, batch, named_key(key, "teacher"))
        forward = ForwardPass(
            model, batch, key, teacher=teacher_pass, alpha=alpha, queue=queues.get(name),
            frequencies=frequencies,
        )  # fmt: skip
        for objective, weight in stream.objectives.items():
            loss = TASKS[objective].loss
            assert loss is not None  # checked by the config
            output = loss(forward, spec.context)
            total += weight * output.loss
            metrics |= {f"{name}/{objective}/{metric}": value for metric, value in output.metrics.items()}
            if output.queue is not None:
                queues[name] = output.queue
    return total, ({"loss": total, **metrics}, queues)


def _alpha(config: RunConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """Return the weight of the teacher's labels: a linear ramp, then constant."""
    distillation = config.tasks.distillation
    if distillation is None:
        return jnp.zeros(())
    return distillation.alpha * jnp.minimum(1.0, step / max(distillation.ramp_steps, 1))


def split_micro_batches(batches: StreamBatches, count: int) -> StreamBatches:
    """Reshape every array to [count, rows / count, ...]; each micro-batch has rows of every device."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), batches)


class StepInputs(NamedTuple):
    """Inputs of a step's losses besides parameters, queues and batches."""

    rng: PRNGKeyArray
    teacher: Params | None
    alpha: Float[Array, ""]
    frequencies: DocumentFrequencies | None


def step_inputs(spec: RunSpec, state: TrainState) -> StepInputs:
    """Return the step's random key, and its teacher: updated before it is used, as in the release."""
    config, teacher = spec.config, state.get("teacher")
    distillation = config.tasks.distillation
    if teacher is not None and distillation is not None:
        student = merge_adapters(state["params"], config.lora.scale)
        teacher = ema_update(teacher, student, distillation.momentum, frozen=distillation.frozen)
    rng = jax.random.fold_in(random_key(spec.hyperparams.seed), state["step"])
    return StepInputs(rng, teacher, _alpha(config, state["step"]), state.get("frequencies"))


def train_step(
    spec: RunSpec, state: TrainState, batches: StreamBatches, hyperparams: Hyperparams
) -> tuple[TrainState, Metrics]:
    """Map (state, batches, hyperparams) to (state, metrics). Pure; the randomness is a function of (seed, step)."""
    spec = dataclasses.replace(spec, hyperparams=hyperparams)
    config = spec.config
    params, frozen = partition(state["params"], config.frozen)
    rng, teacher, alpha, frequencies = step_inputs(spec, state)

    gather_once = config.fsdp_gather == "step"
    axes, frozen_axes = partition(spec.logical_axes, config.frozen)
    gathered = jax.tree.map(all_gather_param, params, axes) if gather_once else params
    gathered_frozen = jax.tree.map(all_gather_param, frozen, frozen_axes) if gather_once else frozen
    gathered_teacher = teacher
    if gather_once and teacher is not None:
        gathered_teacher = jax.tree.map(all_gather_param, teacher, spec.model_def.logical_axes)

    def loss(params: Params, queues: Queues, batches: StreamBatches, rng: PRNGKeyArray) -> Any:
        with assume_params_gathered() if gather_once else contextlib.nullcontext():
            full_params = combine(params, gathered_frozen)
            return streams_loss(spec, full_params, gathered_teacher, queues, batches, rng, alpha, frequencies)

    def compute_grads(queues: Queues, batches: StreamBatches, rng: PRNGKeyArray) -> tuple[Metrics, Queues, Params]:
        (_, (metrics, queues)), grads = jax.value_and_grad(loss, has_aux=True)(gathered, queues, batches, rng)
        return metrics, queues, jax.tree.map(reduce_scatter_grad, grads, axes) if gather_once else grads

    queues = state.get("queues", {})
    if config.grad_accum_steps == 1:
        metrics, queues, grads = compute_grads(queues, batches, rng)
    else:
        count = config.grad_accum_steps

        def accumulate(carry: Any, micro: Any) -> tuple[Any, Metrics]:
            total, queues = carry
            batches, i = micro
            metrics, queues, grads = compute_grads(queues, batches, jax.random.fold_in(rng, i))
            return (jax.tree.map(lambda t, g: t + g / count, total, grads), queues), metrics

        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
        micro = (split_micro_batches(batches, count), jnp.arange(count))
        (grads, queues), stacked = jax.lax.scan(accumulate, (zeros, queues), micro)
        metrics = jax.tree.map(lambda m: m.mean(0), stacked)

    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    opt_state = state["opt"]
    if config.optimizer.offload_moments:
        opt_state = jax.device_put(opt_state, spec.device_shardings["opt"])
    with jax.named_scope("optimizer"):
        updates, opt = spec.optimizer.update(grads, opt_state, params)
        new_params = optax.apply_updates(params, updates)
        new_state: TrainState = {"params": combine(new_params, frozen), "opt": opt}
        if "ema" in state:
            params_fp32 = jax.tree.map(lambda p: p.astype(jnp.float32), new_params)
            new_state["ema"] = ema_update(state["ema"], params_fp32, config.ema_decay)
    if teacher is not None:
        new_state["teacher"] = teacher
    if queues:
        new_state["queues"] = queues
    if frequencies is not None:
        new_state["frequencies"] = frequencies
    squared_norms = {part: optax.tree.norm(tree, squared=True) for part, tree in grads.items()}
    norm = jnp.sqrt(jnp.stack([*squared_norms.values()]).sum())
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    # A step that is not finite changes only the step count. Loss and norm are equal on all devices, so all skip it.
    old_state = {**state, "opt": opt_state}
    for name, new in new_state.items():
        new_state[name] = jax.tree.map(lambda n, o: jax.lax.select(finite, n, o), new, old_state[name])
    new_state["step"] = state["step"] + 1
    metrics |= {"gradient_norm": norm, "skipped": 1 - finite.astype(jnp.int32)}
    metrics |= {f"gradient_norm/{part}": jnp.sqrt(squared) for part, squared in squared_norms.items()}
    # Of the new parameters: reading the old ones would keep both alive.
    metrics |= {f"parameter_norm/{part}": optax.tree.norm(tree) for part, tree in new_state["params"].items()}
    if "contrastive" in state["params"]:
        metrics["temperature"] = state["params"]["contrastive"]["temperature"]
    metrics |= {
        f"learning_rate/{group}": schedule(_num_updates(opt_state)) for group, schedule in spec.schedules.items()
    }
    return new_state, metrics


def _num_updates(opt: optax.OptState) -> Int[Array, ""]:
    """Return the number of updates, which schedules count: fewer than steps where some were skipped."""
    return optax.tree.get(opt, "ScaleByAdamState").count


class TrainStep:
    """The jitted step (state, batches) -> (state, metrics) of a run: the state is donated and keeps its shardings.

    It has a program for each combination of batch sizes, compiled by :meth:`compile`, also before the first call: with
    the same options, so that a replay computes the same bits and finds the program of the run in the compilation cache.
    """

    def __init__(self, jitted: Any, mesh: Mesh, hyperparams: Hyperparams) -> None:
        self._jitted, self._mesh = jitted, mesh
        replicated = replicated_sharding(mesh)
        # On every device now, and not in every step; without the check of device_put that all processes agree.
        self._hyperparams = jax.tree.map(
            lambda x: jax.make_array_from_callback((), replicated, lambda _: x), hyperparams
        )
        self.cache_miss_reason: str | None = None  # of the executable compiled ahead; empty: a hit; None: there is none
        self._programs: dict[BatchSizes, Callable[..., tuple[TrainState, Metrics]]] = {}

    def is_compiled(self, batches: StreamBatches) -> bool:
        """Return whether batches of these sizes have a program."""
        return batch_sizes(batches) in self._programs

    def trace(self, state: TrainState, batches: StreamBatches) -> Any:
        """Trace the step, for :meth:`compile` and for its ``jaxpr``."""
        with jax.set_mesh(self._mesh):
            return self._jitted.trace(state, batches, self._hyperparams)

    def compile(self, traced: Any, batches: StreamBatches) -> dict[str, int]:
        """Compile before the first call with batches of these sizes.

        Returns:
            The bytes of memory that each device needs, by use.
        """
        devices = self._mesh.devices.ravel().tolist()
        with jax.set_mesh(self._mesh):
            lowered = traced.lower()
            self.cache_miss_reason = aot_cache_miss_reason(lowered, devices)
            compiled = lowered.compile(compiler_options(devices[0].platform))
        self._programs[batch_sizes(batches)] = compiled
        analysis = compiled.memory_analysis()
        uses = ("argument", "output", "alias", "temp", "generated_code")
        return {use: int(getattr(analysis, f"{use}_size_in_bytes")) for use in uses} if analysis else {}

    def __call__(self, state: TrainState, batches: StreamBatches) -> tuple[TrainState, Metrics]:
        """Run a step; the old state is deleted."""
        if not self.is_compiled(batches):
            self.compile(self.trace(state, batches), batches)
        with jax.set_mesh(self._mesh):
            return self._programs[batch_sizes(batches)](state, batches, self._hyperparams)


def jit_train_step(spec: RunSpec) -> Any:
    """Return :func:`train_step` under ``jax.jit``, to be lowered with the mesh in context; the state is donated."""
    return jax.jit(
        spec.model_def.with_precision(
            lambda state, batches, hyperparams: train_step(spec, state, batches, hyperparams)
        ),
        donate_argnums=0,
        out_shardings=(spec.shardings, replicated_sharding(spec.mesh)),
    )


def make_train_step(spec: RunSpec) -> TrainStep:
    """Return the step of a run; see :class:`TrainStep`."""
    return TrainStep(jit_train_step(spec), spec.mesh, spec.hyperparams)
