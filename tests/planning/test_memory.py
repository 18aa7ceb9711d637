"""HBM of a device by use, host memory, and a breakdown that adds up to the compiler's peak."""

import dataclasses
import functools
import types

import jax
import pytest

from mplug2_jax.objectives.config import DistillationConfig, VlcConfig
from mplug2_jax.parallel.accelerators import parse_topology
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.planning.memory import Memory, per_device_bytes, program_memory, state_memory
from mplug2_jax.planning.programs import CompiledProgram, abstract_batch, make_run_spec_for_topology, trace_training
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.training.config import OptimizerConfig, RunConfig
from mplug2_jax.training.optim.optimizer import is_orthogonalized
from tests.runs import small_run, text_run

TOPOLOGY = parse_topology("cpu:8")
MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def memory_of(config: RunConfig) -> tuple[dict[str, float], float, float]:
    """Return bytes by use, bytes in host memory, and the number of parameters per device."""
    spec = make_run_spec_for_topology(config, TOPOLOGY)
    batches = {name: abstract_batch(s.data, spec) for name, s in config.streams.items()}
    host, num_params = per_device_bytes(spec.shapes, on_host=True), per_device_bytes(spec.shapes["params"]) / 4
    return state_memory(spec.shapes, batches), host, num_params


def test_parameters_are_four_bytes_and_adam_twice_that() -> None:
    uses, host, num_local = memory_of(small_run(mesh=MESH))
    num_params = make_run_spec_for_topology(small_run(), TOPOLOGY).model_def.num_params()
    assert num_params / 4 <= num_local < num_params / 2  # over fsdp and tensor, except for small ones
    assert uses["parameters"] == 4 * num_local
    assert uses["optimizer"] == pytest.approx(8 * num_local, abs=64)  # and its counters
    assert set(uses) == {"parameters", "optimizer", "batch"}
    assert host == 0


def test_muon_has_one_moment_of_each_kernel_of_a_layer() -> None:
    adamw, muon = (memory_of(small_run(mesh=MESH, optimizer=OptimizerConfig(kind=kind))) for kind in ("adamw", "muon"))
    shapes = make_run_spec_for_topology(small_run(mesh=MESH), TOPOLOGY).shapes["params"]
    leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
    saved = per_device_bytes([leaf for path, leaf in leaves if is_orthogonalized(tuple(key.key for key in path))])
    assert saved > 0.3 * adamw[0]["parameters"]
    assert muon[0]["optimizer"] == pytest.approx(adamw[0]["optimizer"] - saved, abs=64)


def test_a_batch_is_sharded_over_the_batch_axes() -> None:
    pairs, frame = 12 + 12 + 6, 16 * 16 * 3  # tokens of text, instruction and target
    masks = 12 + 12 + 4 * 6  # of text and instruction, and weights
    image, video = (4 * pairs + masks + frames * frame + 4 for frames in (1, 2))
    text = 4 * (12 + 16 + 4) + 12 + 16 + 4 * 4 + 4
    config = small_run()
    spec = make_run_spec_for_topology(config, TOPOLOGY)
    for mesh, shards in ((MESH, 4), (MeshConfig(fsdp=8), 8), (MeshConfig(fsdp=1, tensor=2, sequence=4), 1)):
        resharded = dataclasses.replace(spec, mesh=make_mesh(mesh))
        batches = {name: abstract_batch(s.data, resharded) for name, s in config.streams.items()}
        assert per_device_bytes(batches) == 8 / shards * (image + video + text)


def test_offloaded_moments_are_in_host_memory() -> None:
    uses, host, num_local = memory_of(small_run(mesh=MESH, optimizer=OptimizerConfig(offload_moments=True)))
    assert host == 8 * num_local
    assert uses.get("optimizer", 0.0) < 64
    narrow, _, _ = memory_of(
        small_run(mesh=MESH, optimizer=OptimizerConfig(b2=0.98, mu_dtype="bfloat16", nu_dtype="bfloat16"))
    )  # fmt: skip
    assert narrow["optimizer"] == pytest.approx(4 * num_local, abs=64)


def test_teachers_and_queues_are_separate_uses() -> None:
    tasks = dataclasses.replace(
        small_run().tasks, vlc=VlcConfig(queue_size=16), distillation=DistillationConfig(momentum=0.9)
    )  # fmt: skip
    assert isinstance(tasks, TasksConfig)
    uses, _, num_local = memory_of(small_run(mesh=MESH, tasks=tasks, param_dtype="bfloat16"))
    num_local *= 2  # of two bytes each
    assert (uses["parameters"], uses["teacher"]) == (2 * num_local, 4 * num_local)
    assert uses["queues"] > 2 * 2 * 16 * 16 * 4  # images and texts of two streams, replicated


@functools.cache
def compiled() -> CompiledProgram:
    return trace_training(text_run(mesh=MESH), TOPOLOGY).compile()


def test_the_breakdown_adds_up_to_the_peak() -> None:
    memory = program_memory(compiled(), TOPOLOGY)
    assert sum(memory.breakdown.values()) == pytest.approx(memory.peak)
    uses = {"parameters", "optimizer", "batch", "layout padding", "temporaries", "generated code"}
    assert set(memory.breakdown) == uses
    assert memory.breakdown["temporaries"] > 0
    assert all(size >= 0 for size in memory.breakdown.values())
    analysis = compiled().executable.memory_analysis()
    assert memory.peak >= analysis.argument_size_in_bytes
    arguments = sum(memory.breakdown[name] for name in ("parameters", "optimizer", "batch", "layout padding"))
    unused = 2 * (
        16 * 4 + 16 + 4 * 4 + 4 * 4 + 4
    )  # instructions, targets and ids of two rows: dropped from the arguments
    assert abs(arguments - analysis.argument_size_in_bytes) <= unused


def test_generated_code_is_added_to_the_compilers_peak() -> None:
    analysis = types.SimpleNamespace(argument_size_in_bytes=10**9, peak_memory_in_bytes=3 * 10**9, temp_size_in_bytes=0)
    analysis.generated_code_size_in_bytes = 5 * 10**8  # XLA's CPU compiler reports none
    executable = types.SimpleNamespace(memory_analysis=lambda: analysis)
    memory = program_memory(dataclasses.replace(compiled(), executable=executable), TOPOLOGY)
    assert memory.breakdown["generated code"] == 5e8
    assert memory.peak == sum(memory.breakdown.values()) == pytest.approx(3.5e9)


def test_it_fits_up_to_the_capacity() -> None:
    memory = program_memory(compiled(), TOPOLOGY)
    assert memory.fits
    assert memory.utilization == memory.peak / TOPOLOGY.chip.memory_bytes
    tight = dataclasses.replace(memory, capacity=memory.peak - 1)
    assert isinstance(tight, Memory)
    assert not tight.fits
    assert dataclasses.replace(memory, capacity=memory.peak).fits
