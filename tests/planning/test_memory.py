"""A device's memory: groups by hand, hosts' told apart, and parts that add up to the compiler's peak."""

import dataclasses
import functools
import types

import pytest

from mplug2_jax.objectives.config import DistillationConfig, VlcConfig
from mplug2_jax.parallel.accelerators import parse_topology
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.planning.memory import Memory, held, held_by_host, program_memory, state_memory
from mplug2_jax.planning.programs import Compiled, abstract_batch, blueprint, training_program
from mplug2_jax.tasks.config import TaskSettings
from mplug2_jax.training.config import AdamWConfig, RunConfig
from tests.runs import small_run

TOPOLOGY = parse_topology("cpu:8")
SPLIT = MeshConfig(data=2, fsdp=2, tensor=2)


def memory_of(config: RunConfig) -> tuple[dict[str, float], float, float]:
    """By group, of the host, and numbers of parameters that a device holds."""
    spec = blueprint(config, TOPOLOGY)
    batches = {name: abstract_batch(s.data, spec) for name, s in config.streams.items()}
    return state_memory(spec.shapes, batches), held_by_host(spec.shapes), held(spec.shapes["params"]) / 4


def test_parameters_are_four_bytes_and_adam_twice_that() -> None:
    groups, host, numbers = memory_of(small_run(mesh=SPLIT))
    whole = blueprint(small_run(), TOPOLOGY).definition.num_params()
    assert whole / 4 <= numbers < whole / 2  # over fsdp and tensor, but for what is small
    assert groups["parameters"] == 4 * numbers
    assert groups["optimiser"] == pytest.approx(8 * numbers, abs=64)  # and its counters
    assert set(groups) == {"parameters", "optimiser", "batch"}
    assert host == 0


def test_a_batch_lies_over_the_axes_of_the_batch() -> None:
    pairs, frame = 12 + 12 + 6, 16 * 16 * 3  # tokens of text, instruction and target
    masks = 12 + 12 + 4 * 6  # of text and instruction, and weights
    image, video = (4 * pairs + masks + frames * frame + 4 for frames in (1, 2))
    text = 4 * (12 + 16 + 4) + 12 + 16 + 4 * 4 + 4
    config = small_run()
    spec = blueprint(config, TOPOLOGY)
    for mesh, shards in ((SPLIT, 4), (MeshConfig(fsdp=8), 8), (MeshConfig(fsdp=1, tensor=2, sequence=4), 1)):
        laid = dataclasses.replace(spec, mesh=make_mesh(mesh))
        batches = {name: abstract_batch(s.data, laid) for name, s in config.streams.items()}
        assert held(batches) == 8 / shards * (image + video + text)


def test_offloaded_moments_are_the_hosts() -> None:
    groups, host, numbers = memory_of(small_run(mesh=SPLIT, optimizer=AdamWConfig(offload_moments=True)))
    assert host == 8 * numbers
    assert groups.get("optimiser", 0.0) < 64
    narrow, _, _ = memory_of(
        small_run(mesh=SPLIT, optimizer=AdamWConfig(b2=0.98, mu_dtype="bfloat16", nu_dtype="bfloat16"))
    )  # fmt: skip
    assert narrow["optimiser"] == pytest.approx(4 * numbers, abs=64)


def test_teachers_and_queues_are_told_apart() -> None:
    tasks = dataclasses.replace(
        small_run().tasks, vlc=VlcConfig(queue_size=16), distillation=DistillationConfig(momentum=0.9)
    )  # fmt: skip
    assert isinstance(tasks, TaskSettings)
    groups, _, numbers = memory_of(small_run(mesh=SPLIT, tasks=tasks, param_dtype="bfloat16"))
    numbers *= 2  # of two bytes each
    assert (groups["parameters"], groups["teacher"]) == (2 * numbers, 4 * numbers)
    assert groups["queues"] > 2 * 2 * 16 * 16 * 4  # two streams' pictures and texts, whole on every device


@functools.cache
def compiled() -> Compiled:
    text = small_run().streams["text"]
    config = small_run(mesh=SPLIT, streams={"text": dataclasses.replace(text, objectives={"mlm": 1.0})}, evaluations={})
    return training_program(config, TOPOLOGY).compile()


def test_the_parts_of_a_program_add_up_to_its_peak() -> None:
    memory = program_memory(compiled(), TOPOLOGY)
    assert sum(memory.parts.values()) == pytest.approx(memory.peak)
    assert set(memory.parts) == {"parameters", "optimiser", "batch", "layout", "temporaries", "machine code"}
    assert memory.parts["temporaries"] > 0
    assert all(size >= 0 for size in memory.parts.values())
    analysis = compiled().executable.memory_analysis()
    assert memory.peak >= analysis.argument_size_in_bytes
    given = sum(memory.parts[name] for name in ("parameters", "optimiser", "batch", "layout"))
    unused = 2 * (16 * 4 + 16 + 4 * 4 + 4 * 4 + 4)  # two rows' instructions, targets and ids: no argument, but there
    assert abs(given - analysis.argument_size_in_bytes) <= unused


def test_machine_code_lies_beside_the_compilers_peak() -> None:
    analysis = types.SimpleNamespace(argument_size_in_bytes=10**9, peak_memory_in_bytes=3 * 10**9, temp_size_in_bytes=0)
    analysis.generated_code_size_in_bytes = 5 * 10**8  # XLA's CPU compiler reports none
    executable = types.SimpleNamespace(memory_analysis=lambda: analysis)
    memory = program_memory(dataclasses.replace(compiled(), executable=executable), TOPOLOGY)
    assert memory.parts["machine code"] == 5e8
    assert memory.peak == sum(memory.parts.values()) == pytest.approx(3.5e9)


def test_it_fits_where_there_is_room() -> None:
    memory = program_memory(compiled(), TOPOLOGY)
    assert memory.fits
    assert memory.share == memory.peak / TOPOLOGY.chip.memory_bytes
    tight = dataclasses.replace(memory, capacity=memory.peak - 1)
    assert isinstance(tight, Memory)
    assert not tight.fits
    assert dataclasses.replace(memory, capacity=memory.peak).fits
