"""The train state: a plain nested dict of arrays, made where it lives."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

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
from mplug2_jax.training.optim.optimizer import adamw
from mplug2_jax.training.optim.partition import combine, partition
from mplug2_jax.training.optim.schedule import make_schedule

HOST_MEMORY = "pinned_host"  # the memory of a host that its devices copy from without its help

TrainState = dict[str, Any]
"""``params``, ``opt`` (optax, of what is trained), ``step``; where the run has them, ``ema``, ``teacher``, ``queues``,
and the ``frequencies`` of captions' n-grams.

LoRA's pairs stand in ``params`` and ``ema`` beside their kernels; a teacher's kernels are merged.

``ema`` starts as the trained parameters and after every update becomes decay * ema + (1 - decay) * parameters, in
float32.
"""


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """Everything that is known of a run's arrays before there are any."""

    config: RunConfig
    context: TaskContext
    mesh: Mesh
    definition: ModelDef
    optimizer: optax.GradientTransformation
    schedules: Mapping[str, optax.Schedule]  # of learning rates, by parameter group
    logical_axes: Params  # logical ones, of the state's parameters
    placement: ParamShardings
    shapes: TrainState  # of jax.ShapeDtypeStruct with shardings
    shardings: TrainState

    def init(self) -> TrainState:
        """A fresh state; every shard is made on its device, nothing is ever whole on one host."""

        def fresh() -> TrainState:
            params = self.definition.init(random_key(self.config.seed))
            return _with_parameters(params, self.config, self.optimizer)

        make = jax.jit(fresh, out_shardings=self.device_shardings)
        with jax.set_mesh(self.mesh):
            return jax.device_put(make(), self.shardings)

    @property
    def device_shardings(self) -> TrainState:
        """Where the state lives while a step computes: as always, but with nothing in the hosts' memory."""
        return jax.tree.map(lambda s: s.with_memory_kind("device"), self.shardings)

    @property
    def eval_param_shapes(self) -> Params:
        """What :func:`eval_params` makes of a state of these shapes."""
        return remove_adapters(combine(self.shapes.get("ema", {}), self.shapes["params"]))


def make_run_spec(
    config: RunConfig, tokens: SpecialTokens, mesh: Mesh, parts: tuple[str, ...] | None = None
) -> RunSpec:
    """Describes a run on a mesh, or what is needed of its model; no array is made.

    Raises:
        UserError: parts and sizes that do not make a model.
    """
    definition = define_model(config.model, config.parts() if parts is None else parts)
    peak = config.optimizer.learning_rate
    vision_peak = config.optimizer.vision_learning_rate
    rates = {
        group: make_schedule(config.schedule, rate, config.steps, config.grad_accum_steps)
        for group, rate in (("rest", peak), ("vision", peak if vision_peak is None else vision_peak))
    }
    parameters = add_adapters(definition.shapes, config.lora.parts, adapter_shapes(config.lora))
    axes = add_adapters(definition.axes, config.lora.parts, adapter_axes)
    decay = config.optimizer.layer_decay
    factors = None if decay == 1 else partition(lr_scales(parameters, config.model, decay), config.frozen)[0]
    optimizer = adamw(config.optimizer, rates["rest"], rates["vision"], factors)
    placement = make_param_shardings(parameters, axes, mesh)
    shapes = jax.eval_shape(lambda params: _with_parameters(params, config, optimizer), definition.shapes)
    shardings = _state_shardings(config, shapes, placement, optimizer, mesh)
    described = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    context = TaskContext(settings=config.tasks, tokens=tokens)
    return RunSpec(config, context, mesh, definition, optimizer, rates, axes, placement, described, shardings)


def _with_parameters(params: Params, config: RunConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """Return a fresh state around fresh float32 parameters."""
    key = random_key(config.seed)
    params = jax.tree.map(lambda p: p.astype(config.param_dtype), params)
    learning = add_adapters(params, config.lora.parts, init_adapters(config.lora, key))
    opt = optimizer.init(partition(learning, config.frozen)[0])
    state: TrainState = {"params": learning, "opt": opt, "step": jnp.zeros((), jnp.int32)}
    if config.ema_decay:
        state["ema"] = init_ema(config, learning)
    if config.has_teacher:
        state["teacher"] = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)  # 16 bits round its steps away
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
    """What an average starts as: a copy of what is trained, in float32."""
    return jax.tree.map(lambda p: jnp.array(p, jnp.float32), partition(params, config.frozen)[0])


def eval_params(spec: RunSpec, state: TrainState) -> Params:
    """The parameters that evaluations use: averaged where the run keeps an average, LoRA's pairs in their kernels."""
    return merge_adapters(
        combine(state.get("ema", {}), state["params"]), spec.config.lora.scale, merge_adapter_on_devices
    )


def _state_shardings(
    config: RunConfig,
    shapes: TrainState,
    placement: ParamShardings,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    whole = replicated_sharding(mesh)
    trained, _ = partition(placement.shardings, config.frozen)
    moments_in = HOST_MEMORY if config.optimizer.offload_moments else None
    shardings: TrainState = jax.tree.map(lambda _: whole, shapes)
    shardings["params"] = placement.shardings
    # Moments live with their parameters. Without saying so they would all be put on one device.
    shardings["opt"] = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, s: s.with_memory_kind(moments_in),
        shapes["opt"],
        trained,
        transform_non_params=lambda _: whole,
    )
    if "ema" in shapes:
        shardings["ema"] = trained
    if "teacher" in shapes:
        shardings["teacher"] = remove_adapters(placement.shardings)
    return shardings
