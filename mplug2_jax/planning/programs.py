"""The programs of a run, compiled ahead of time for machines that need not exist."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.storage.paths import to_path
from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.evaluation.loop import check_task, jit_predict
from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.parallel.accelerators import Topology
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.parallel.placement import batch_sharding, check_batch_divisible, num_batch_shards, replicated_sharding
from mplug2_jax.tasks.base import Prompts
from mplug2_jax.tasks.table import TASKS
from mplug2_jax.training.compilation import (
    cache_everything,
    compiler_options,
    disable_cache,
    program_fingerprint,
    write_manifest,
)
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.state import RunSpec, make_run_spec
from mplug2_jax.training.step import jit_train_step
from mplug2_jax.training.workdir import load_or_train_tokenizer, special_tokens

# Without a TPU on this machine: libtpu must not search for one, nor warn that it finds none.
_NO_TPU_ENV = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}


def get_topology_devices(topology: Topology) -> list[Any]:
    """Return the JAX devices of a topology: described by libtpu's compiler, or simulated CPU devices for other chips.

    Raises:
        UserError: libtpu is missing, in use, or does not know the topology.
    """
    if topology.chip.platform != "tpu":
        return _simulate_devices(topology)
    from jax.experimental import topologies

    for name, value in _NO_TPU_ENV.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    options |= {"chip_config_name": topology.chip.libtpu_variant} if topology.chip.libtpu_variant else {}
    options |= {"chips_per_host_bounds": [1, 1, 1]} if topology.chips_per_slice == 1 else {}  # libtpu expects four
    try:
        return list(topologies.get_topology_desc(topology.name, "tpu", **options).devices)
    except Exception as error:
        message = str(error)
        if "lockfile" in message or "already in use" in message:
            raise UserError(
                "libtpu is in use by another process, and only one process can load it: wait until that process exits, "
                "or set ALLOW_MULTIPLE_LIBTPU_LOAD=1 if it, too, only compiles"
            ) from error
        if "not installed" in message:
            raise UserError(
                "plans for TPUs need the compiler in libtpu, which is not installed: pip install 'mplug2-jax[tpu]'"
            ) from error
        raise UserError(f"libtpu does not know the topology {topology}: {message.splitlines()[0]}") from error


def _simulate_devices(topology: Topology) -> list[Any]:
    with contextlib.suppress(RuntimeError):  # the backend is initialized already, with any number of devices
        jax.config.update("jax_num_cpu_devices", topology.devices)
    devices = jax.devices("cpu")
    if len(devices) < topology.devices:
        raise UserError(
            f"--topology {topology} is planned on {topology.devices} simulated CPU devices, but JAX was started with "
            f"{len(devices)}; unset XLA_FLAGS and JAX_NUM_CPU_DEVICES, or set the latter to {topology.devices}"
        )
    return list(devices[: topology.devices])


@dataclasses.dataclass(frozen=True)
class TracedProgram:
    """A program of a run, traced and lowered for a topology."""

    name: str  # "train", or the name of an evaluation
    spec: RunSpec
    topology: Topology
    lowered: Any
    state: Any  # arguments that persist between calls, as jax.ShapeDtypeStruct
    batches: Any  # arguments of each call
    trace_seconds: float

    def compile(self, effort: float = 0.0, executable_dir: Path | None = None) -> "CompiledProgram":
        """Compile the program.

        Args:
            effort: of the compiler, from -1 (compile fast) to 1 (run fast); ``train`` uses 0.
            executable_dir: folder to save the executable in, for ``train`` with ``config.compilation_cache`` there.

        Raises:
            JaxRuntimeError: RESOURCE_EXHAUSTED, if the program does not fit.
        """
        start = time.perf_counter()
        with disable_cache() if executable_dir is None else cache_everything(executable_dir):
            options = compiler_options(self.topology.chip.platform)
            options |= {"exec_time_optimization_effort": effort} if effort else {}
            compiled = self.lowered.compile(options)
        if executable_dir is not None:
            write_manifest(executable_dir, program_fingerprint(self.lowered, self.spec.mesh.devices.ravel().tolist()))
        return CompiledProgram(self, compiled, time.perf_counter() - start)


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A program compiled for a topology."""

    program: TracedProgram
    executable: Any
    compile_seconds: float


def make_run_spec_for_topology(config: RunConfig, topology: Topology) -> RunSpec:
    """Return the spec of a run on a topology. Raises UserError if its mesh or batches do not fit."""
    mesh = make_mesh(config.mesh, get_topology_devices(topology))
    for name, stream in config.streams.items():
        for field, size in stream.data.batch_sizes.items():
            microbatch = size // config.grad_accum_steps
            check_batch_divisible(f"config.streams.{name}.data.{field} / config.grad_accum_steps", microbatch, mesh)
    return make_run_spec(config, load_special_tokens(config), mesh)  # last: loading a tokenizer may take a while


def load_special_tokens(config: RunConfig) -> SpecialTokens:
    """Return the special token ids of the run's tokenizer; BERT's if its file is not on this machine."""
    if config.tokenizer.path and not to_path(config.tokenizer.path).is_file():
        return SpecialTokens()
    return special_tokens(load_or_train_tokenizer(config.tokenizer))


def trace_training(config: RunConfig, topology: Topology) -> TracedProgram:
    """Trace the train step of a run: the one that ``train`` runs.

    Raises:
        UserError: the mesh does not fit the topology, or the batches do not fit the mesh or the objectives.
    """
    spec = make_run_spec_for_topology(config, topology)
    batches = {name: abstract_batch(stream.data, spec) for name, stream in config.streams.items()}
    for name, stream in config.streams.items():
        for objective in stream.objectives:
            TASKS[objective].check(set(batches[name]), f"config.streams.{name}")
    start = time.perf_counter()
    with jax.set_mesh(spec.mesh):
        lowered = jit_train_step(spec).lower(spec.shapes, batches, spec.hyperparam_shapes)
    return TracedProgram("train", spec, topology, lowered, spec.shapes, batches, time.perf_counter() - start)


def trace_evaluation(config: RunConfig, topology: Topology, name: str) -> TracedProgram:
    """Trace one of a run's evaluations, with ``per_device_batch_size`` examples on each device.

    Searches are not constrained to a list of answers. Of retrieval with reranking, this is the first stage; of
    classification by prompts, the stage after the prompts are encoded.

    Raises:
        UserError: the evaluation is unknown or needs parts that the model lacks, the mesh does not fit the topology, or
            the batches do not fit the mesh.
    """
    if name not in config.evaluations:
        raise UserError(f"--evaluation {name}: {did_you_mean(name, config.evaluations)}")
    spec, evaluation = make_run_spec_for_topology(config, topology), config.evaluations[name]
    check_batch_divisible(f"config.evaluations.{name}.data.batch_size", evaluation.data.batch_size, spec.mesh)
    rows = evaluation.per_device_batch_size * num_batch_shards(spec.mesh)
    data = dataclasses.replace(evaluation.data, batch_size=rows)
    example = {key: shape[1:] for key, (shape, _) in data.shapes().items()}
    check_task(f"config.evaluations.{name}", evaluation.task, example, spec.model_def)
    start = time.perf_counter()
    with jax.set_mesh(spec.mesh):
        batch = {**abstract_batch(data, spec, mask=True), **_precomputed(spec, evaluation)}
        predict = jit_predict(evaluation.task, spec.model_def, spec.context, spec.mesh)
        params = spec.eval_param_shapes
        lowered = predict.lower(params, batch)
    return TracedProgram(name, spec, topology, lowered, params, batch, time.perf_counter() - start)


def trace_program(config: RunConfig, topology: Topology, evaluation: str | None = None) -> TracedProgram:
    """Trace one of a run's evaluations, or without a name its train step; the errors are those of the two."""
    return trace_evaluation(config, topology, evaluation) if evaluation else trace_training(config, topology)


def _precomputed(spec: RunSpec, evaluation: EvaluationConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Return what an evaluation computes once, before its batches; with one prompt per class."""
    precompute, classes = TASKS[evaluation.task].precompute, len(evaluation.data.examples.classes)
    if precompute is None:
        return {}
    context = dataclasses.replace(spec.context, prompts=Prompts(np.zeros((1, classes, 1), np.int32), classes, 1))
    shapes = jax.eval_shape(lambda params: precompute(spec.model_def.bind(params), context), spec.eval_param_shapes)
    sharding = replicated_sharding(spec.mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def abstract_batch(data: DataConfig, spec: RunSpec, *, mask: bool = False) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Return a stream's batch, as :func:`~mplug2_jax.parallel.placement.put_batch` shards it, as ShapeDtypeStructs."""
    sharding = batch_sharding(spec.mesh)
    shapes = data.shapes() | ({"example_mask": ((data.batch_size,), np.bool_)} if mask else {})
    return {
        key: jax.ShapeDtypeStruct(shape, jnp.int32 if dtype is np.int64 else dtype, sharding=sharding)
        for key, (shape, dtype) in shapes.items()
    }
