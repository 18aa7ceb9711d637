"""The real programs of a run, compiled for machines that need not be here."""

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

# There is no TPU here: libtpu need not look for one, nor complain that it finds none.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}


def get_topology_devices(topology: Topology) -> list[Any]:
    """JAX's devices of a topology: those that libtpu's compiler describes, or simulated CPUs in place of all others.

    Raises:
        UserError: libtpu is missing, in use, or does not know the topology.
    """
    if topology.chip.platform != "tpu":
        return _simulated(topology)
    from jax.experimental import topologies

    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    options |= {"chip_config_name": topology.chip.libtpu_variant} if topology.chip.libtpu_variant else {}
    options |= {"chips_per_host_bounds": [1, 1, 1]} if topology.chips_per_slice == 1 else {}  # libtpu expects four
    try:
        return list(topologies.get_topology_desc(topology.name, "tpu", **options).devices)
    except Exception as error:
        why = str(error)
        if "lockfile" in why or "already in use" in why:
            raise UserError(
                "libtpu is in use by another process, and serves one at a time: wait for it to end, or set "
                "ALLOW_MULTIPLE_LIBTPU_LOAD=1 where that process only compiles, too"
            ) from error
        if "not installed" in why:
            raise UserError(
                "plans for TPUs need the compiler in libtpu, which is not installed: pip install 'mplug2-jax[tpu]'"
            ) from error
        raise UserError(f"libtpu does not know the topology {topology}: {why.splitlines()[0]}") from error


def _simulated(topology: Topology) -> list[Any]:
    with contextlib.suppress(RuntimeError):  # the backend is there already, with however many devices it has
        jax.config.update("jax_num_cpu_devices", topology.devices)
    devices = jax.devices("cpu")
    if len(devices) < topology.devices:
        raise UserError(
            f"--topology {topology} is planned on {topology.devices} simulated CPU devices, but JAX was started with "
            f"{len(devices)}; unset XLA_FLAGS and JAX_NUM_CPU_DEVICES, or set the latter to {topology.devices}"
        )
    return list(devices[: topology.devices])


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of a run, traced for a topology."""

    name: str  # "train", or the evaluation's
    spec: RunSpec
    topology: Topology
    lowered: Any
    state: Any  # what it holds from call to call, as jax.ShapeDtypeStruct
    batches: Any  # what each call brings
    seconds: float  # that tracing took

    def compile(self, effort: float = 0.0, keep: Path | None = None) -> "Compiled":
        """Compiles it, with an effort from -1 (compile fast) to 1 (run fast); 0 is what ``train`` does.

        Args:
            effort: of the compiler.
            keep: a folder to keep the executable in, for ``train`` with ``config.compilation_cache`` there.

        Raises:
            JaxRuntimeError: RESOURCE_EXHAUSTED, where the compiler finds no room.
        """
        start = time.perf_counter()
        with disable_cache() if keep is None else cache_everything(keep):
            options = compiler_options(self.topology.chip.platform) or {}
            options |= {"exec_time_optimization_effort": effort} if effort else {}
            compiled = self.lowered.compile(options or None)
        if keep is not None:
            write_manifest(keep, program_fingerprint(self.lowered, self.spec.mesh.devices.ravel().tolist()))
        return Compiled(self, compiled, time.perf_counter() - start)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for a topology, as its compiler made it."""

    program: Program
    executable: Any
    seconds: float


def blueprint(config: RunConfig, topology: Topology) -> RunSpec:
    """A run laid out on a topology. Raises UserError where it does not fit the mesh."""
    mesh = make_mesh(config.mesh, get_topology_devices(topology))
    for name, stream in config.streams.items():
        micro = stream.data.batch_size // config.grad_accum_steps
        check_batch_divisible(f"config.streams.{name}.data.batch_size / config.grad_accum_steps", micro, mesh)
    return make_run_spec(config, tokens_of(config), mesh)  # last: a tokeniser may take a while


def tokens_of(config: RunConfig) -> SpecialTokens:
    """The ids of the run's tokeniser; BERT's where its file is not on this machine."""
    if config.tokenizer.path and not Path(config.tokenizer.path).is_file():
        return SpecialTokens()
    return special_tokens(load_or_train_tokenizer(config.tokenizer))


def training_program(config: RunConfig, topology: Topology) -> Program:
    """The step of a run: the same that ``train`` runs.

    Raises:
        UserError: a mesh that does not fit the topology, or batches that do not fit the mesh or the objectives.
    """
    spec = blueprint(config, topology)
    batches = {name: abstract_batch(stream.data, spec) for name, stream in config.streams.items()}
    for name, stream in config.streams.items():
        for objective in stream.objectives:
            TASKS[objective].check(set(batches[name]), f"config.streams.{name}")
    start = time.perf_counter()
    with jax.set_mesh(spec.mesh):
        lowered = jit_train_step(spec).lower(spec.shapes, batches)
    return Program("train", spec, topology, lowered, spec.shapes, batches, time.perf_counter() - start)


def evaluation_program(config: RunConfig, topology: Topology, name: str) -> Program:
    """What one of a run's evaluations does with ``per_device_batch_size`` examples on each device.

    A search is not constrained to a list of answers.

    Of retrieval that is re-ranked it is the first step, without matching; of classes by prompts the second, once these
    are encoded.

    Raises:
        UserError: an unknown evaluation, one that the model has no parts for, a mesh that does not fit the topology,
            or batches that do not fit the mesh.
    """
    if name not in config.evaluations:
        raise UserError(f"--evaluation {name}: {did_you_mean(name, config.evaluations)}")
    spec, evaluation = blueprint(config, topology), config.evaluations[name]
    check_batch_divisible(f"config.evaluations.{name}.data.batch_size", evaluation.data.batch_size, spec.mesh)
    rows = evaluation.per_device_batch_size * num_batch_shards(spec.mesh)
    data = dataclasses.replace(evaluation.data, batch_size=rows)
    example = {key: shape[1:] for key, (shape, _) in data.shapes().items()}
    check_task(f"config.evaluations.{name}", evaluation.task, example, spec.definition)
    start = time.perf_counter()
    with jax.set_mesh(spec.mesh):
        batch = {**abstract_batch(data, spec, mask=True), **_shared(spec, evaluation)}
        predict = jit_predict(evaluation.task, spec.definition, spec.context, spec.mesh)
        params = spec.eval_param_shapes
        lowered = predict.lower(params, batch)
    return Program(name, spec, topology, lowered, params, batch, time.perf_counter() - start)


def _shared(spec: RunSpec, evaluation: EvaluationConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """What all batches of an evaluation share, which is made before them. One prompt stands for each class."""
    precompute, classes = TASKS[evaluation.task].precompute, len(evaluation.data.examples.classes)
    if precompute is None:
        return {}
    context = dataclasses.replace(spec.context, prompts=Prompts(np.zeros((1, classes, 1), np.int32), classes, 1))
    made = jax.eval_shape(lambda params: precompute(spec.definition.bind(params), context), spec.eval_param_shapes)
    whole = replicated_sharding(spec.mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), made)


def abstract_batch(data: DataConfig, spec: RunSpec, *, mask: bool = False) -> Mapping[str, jax.ShapeDtypeStruct]:
    """A stream's batch as :func:`~mplug2_jax.parallel.placement.put_batch` puts it on the mesh, without its numbers."""
    sharding = batch_sharding(spec.mesh)
    made = data.shapes() | ({"example_mask": ((data.batch_size,), np.bool_)} if mask else {})
    return {
        key: jax.ShapeDtypeStruct(shape, jnp.int32 if dtype is np.int64 else dtype, sharding=sharding)
        for key, (shape, dtype) in made.items()
    }
