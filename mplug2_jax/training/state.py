"""The train state: a nested dict of arrays, each shard of which is initialized on its own device."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.model.mplug2 import ModelDef, Params, define_model
from mplug2_jax.model.prng import random_key
from mplug2_jax.objectives.cider import uniform_frequencies
from mplug2_jax.objectives.queue import init_queue
from mplug2_jax.parallel.placement import ParamShardings, make_param_shardings, replicated_sharding
from mplug2_jax.tasks.base import TaskContext
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.optim.layer_decay import lr_scales
from mplug2_jax.training.optim.lora import (
    adapter_axes,
    adapter_shapes,
    add_adapters,
    init_adapters,
    merge_adapter_on_devices,
    merge_adapters,
    remove_adapters,
)
from mplug2_jax.training.optim.optimizer import make_optimizer
from mplug2_jax.training.optim.partition import combine, partition
from mplug2_jax.training.optim.schedule import make_schedule

HOST_MEMORY = "pinned_host"  # memory of the host that devices copy from directly

TrainState = dict[str, Any]
"""``params``, ``opt`` (optax, of what is trained), ``step``; where the run has them, ``ema``, ``teacher``, ``queues``,
and the ``frequencies`` of captions' n-grams.

LoRA's adapters stand in ``params`` and ``ema`` next to their kernels; a teacher's kernels are merged.

``ema`` starts as the trained parameters and after every update becomes decay * ema + (1 - decay) * parameters, in
float32.
"""


class Hyperparams(NamedTuple):
    """Config values that are inputs of the compiled step, so that runs that differ only in them share a program."""

    seed: UInt32[Array | np.ndarray, ""]
    learning_rates: Mapping[str, Float[Array | np.ndarray, ""]]  # peaks, by parameter group


def make_hyperparams(config: RunConfig) -> Hyperparams:
    """Return the hyperparameters of a run."""
    rate, vision_rate = config.optimizer.learning_rate, config.optimizer.vision_learning_rate
    rates = {"rest": rate, "vision": rate if vision_rate is None else vision_rate}
    return Hyperparams(
        np.asarray(config.seed % 2**32, np.uint32),
        {group: np.asarray(peak, np.float32) for group, peak in rates.items()},
    )


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """Everything about a run's arrays that is known before any is allocated."""

    config: RunConfig
    context: TaskContext
    mesh: Mesh
    model_def: ModelDef
    hyperparams: Hyperparams
    lr_scales: Params | None  # factors of the learning rate of each trained parameter
    logical_axes: Params  # of the state's parameters, LoRA's adapters included
    param_shardings: ParamShardings
    shapes: TrainState  # of jax.ShapeDtypeStruct with shardings
    shardings: TrainState

    @property
    def hyperparam_shapes(self) -> Hyperparams:
        """Return the shapes and shardings of ``hyperparams`` on the devices, to lower the program of training."""
        replicated = replicated_sharding(self.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), self.hyperparams)

    @property
    def schedules(self) -> Mapping[str, optax.Schedule]:
        """Return the learning rates, by parameter group."""
        return _make_schedules(self.config, self.hyperparams)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Return the optimizer of the trained parameters."""
        return _make_optimizer(self.config, self.hyperparams, self.lr_scales)

    def init(self) -> TrainState:
        """Initialize the state, every shard on its device; no array is ever whole on one host."""

        def init_state(seed: UInt32[Array, ""]) -> TrainState:
            key = random_key(seed)
            return _init_state(self.model_def.init(key), self.config, self.optimizer, key)

        init_on_devices = jax.jit(init_state, out_shardings=self.device_shardings)
        with jax.set_mesh(self.mesh):
            return jax.device_put(init_on_devices(self.hyperparams.seed), self.shardings)

    @property
    def device_shardings(self) -> TrainState:
        """Return the state's shardings while a step computes: the usual ones, with nothing in host memory."""
        return jax.tree.map(lambda s: s.with_memory_kind("device"), self.shardings)

    @property
    def eval_param_shapes(self) -> Params:
        """Return the shapes of what :func:`eval_params` returns."""
        return remove_adapters(combine(self.shapes.get("ema", {}), self.shapes["params"]))


def make_run_spec(
    config: RunConfig, tokens: SpecialTokens, mesh: Mesh, parts: tuple[str, ...] | None = None
) -> RunSpec:
    """Describe a run on a mesh without allocating an array; ``parts`` limits the model to what is needed of it.

    Raises:
        UserError: parts and sizes that do not fit together.
    """
    model_def = define_model(config.model, config.parts() if parts is None else parts)
    hyperparams = make_hyperparams(config)
    params = add_adapters(model_def.shapes, config.lora.parts, adapter_shapes(config.lora))
    axes = add_adapters(model_def.logical_axes, config.lora.parts, adapter_axes)
    decay = config.optimizer.layer_decay
    scales = None if decay == 1 else partition(lr_scales(params, config.model, decay), config.frozen)[0]
    optimizer = _make_optimizer(config, hyperparams, scales)
    param_shardings = make_param_shardings(params, axes, mesh)
    shapes = jax.eval_shape(
        lambda params: _init_state(params, config, optimizer, random_key(hyperparams.seed)), model_def.shapes
    )
    shardings = _state_shardings(config, shapes, param_shardings, optimizer, mesh)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    context = TaskContext(config=config.tasks, tokens=tokens)
    return RunSpec(config, context, mesh, model_def, hyperparams, scales, axes, param_shardings, shapes, shardings)


def _make_schedules(config: RunConfig, hyperparams: Hyperparams) -> Mapping[str, optax.Schedule]:
    return {
        group: make_schedule(config.schedule, peak, config.steps, config.grad_accum_steps)
        for group, peak in hyperparams.learning_rates.items()
    }


def _make_optimizer(config: RunConfig, hyperparams: Hyperparams, scales: Params | None) -> optax.GradientTransformation:
    schedules = _make_schedules(config, hyperparams)
    return make_optimizer(config.optimizer, schedules["rest"], schedules["vision"], scales)


def _init_state(
    params: Params, config: RunConfig, optimizer: optax.GradientTransformation, key: PRNGKeyArray
) -> TrainState:
    """Return the initial state for initial float32 parameters."""
    params = jax.tree.map(lambda p: p.astype(config.param_dtype), params)
    adapted = add_adapters(params, config.lora.parts, init_adapters(config.lora, key))
    opt = optimizer.init(partition(adapted, config.frozen)[0])
    state: TrainState = {"params": adapted, "opt": opt, "step": jnp.zeros((), jnp.int32)}
    if config.ema_decay:
        state["ema"] = init_ema(config, adapted)
    if config.has_teacher:
        # In float32, as 16 bits would round its updates away.
        state["teacher"] = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
    size = config.tasks.vlc.queue_size
    if size:
        state["queues"] = {
            name: init_queue(jax.random.fold_in(key, i), size, config.model.contrastive_width)
            for i, (name, stream) in enumerate(sorted(config.streams.items()))
            if "vlc" in stream.objectives
        }
    if any("scst" in stream.objectives for stream in config.streams.values()):
        state["frequencies"] = uniform_frequencies()  # until the captions are counted
    return state


def init_ema(config: RunConfig, params: Params) -> Params:
    """Return the EMA's initial value: a copy of what is trained, in float32."""
    return jax.tree.map(lambda p: jnp.array(p, jnp.float32), partition(params, config.frozen)[0])


def eval_params(spec: RunSpec, state: TrainState) -> Params:
    """Return the parameters to evaluate: the EMA where the run keeps one, LoRA's adapters merged into their kernels."""
    params = combine(state.get("ema", {}), state["params"])
    return merge_adapters(params, spec.config.lora.scale, merge_adapter_on_devices)


def _state_shardings(
    config: RunConfig, shapes: TrainState, param_shardings: ParamShardings, optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:  # fmt: skip
    replicated = replicated_sharding(mesh)
    trained, _ = partition(param_shardings.shardings, config.frozen)
    memory_kind = HOST_MEMORY if config.optimizer.offload_moments else None

    def shard_moment(moment: Any, sharding: Any) -> Any:
        return moment if isinstance(moment, optax.MaskedNode) else sharding.with_memory_kind(memory_kind)

    shardings: TrainState = jax.tree.map(lambda _: replicated, shapes)
    shardings["params"] = param_shardings.shardings
    # Moments are sharded like their parameters; by default they would all be put on one device.
    shardings["opt"] = optax.tree_utils.tree_map_params(
        optimizer, shard_moment, shapes["opt"], trained, transform_non_params=lambda _: replicated,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),  # in place of a moment that a parameter does not have
    )  # fmt: skip
    if "ema" in shapes:
        shardings["ema"] = trained
    if "teacher" in shapes:
        shardings["teacher"] = remove_adapters(param_shardings.shardings)
    return shardings
