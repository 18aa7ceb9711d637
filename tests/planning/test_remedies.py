"""Memory-saving changes that keep the loss curve: their order, their overrides, and out-of-memory messages."""

import dataclasses
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.config import as_recipe, build, override
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import RematConfig
from mplug2_jax.parallel.accelerators import CHIPS, Topology, parse_topology, topology_names
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.planning.oom import Buffer, OutOfMemory
from mplug2_jax.planning.programs import CompiledProgram, get_topology_devices, trace_training
from mplug2_jax.planning.remedies import (
    bigger_topology,
    diff_overrides,
    find_nearest_fit,
    format_oom,
    largest_buffers_on_bigger_chip,
    memory_saving_changes,
    try_compile,
)
from mplug2_jax.training.config import RunConfig
from tests.runs import small_model, text_run

GIB = 2.0**30
TOWERS = ("vision", "text", "fusion", "decoder")


def apply(config: RunConfig, overrides: tuple[str, ...]) -> RunConfig:
    """Apply overrides as the command line does."""
    return build(RunConfig, override(as_recipe(config), overrides))


def test_remat_comes_before_smaller_microbatches() -> None:
    overrides = [change.overrides for change in memory_saving_changes(text_run())]
    every = {p: tuple(f"--config.model.remat.{tower}={p}" for tower in TOWERS) for p in ("dots", "full")}
    assert overrides == [
        every["dots"],
        ("--config.model.remat.vision=full", *every["dots"][1:]),
        every["full"],
        *((*every["full"], f"--config.grad_accum_steps={steps}") for steps in (2, 4, 8)),
    ]


remats = st.builds(dict, **dict.fromkeys(TOWERS, st.sampled_from(["none", "dots", "full"])))


@given(remats, st.sampled_from([1, 2, 4, 8]), st.sampled_from([8, 12, 24]))
def test_changes_only_save_memory(remat: dict[str, str], steps: int, batch_size: int) -> None:
    if batch_size % steps:
        steps = 1
    config = text_run(batch_size=batch_size, model=small_model(remat=RematConfig(**remat)), grad_accum_steps=steps)
    rank = ("none", "dots", "full").index
    before = config
    for change in memory_saving_changes(config):
        after = change.config
        assert change.overrides
        assert apply(config, change.overrides) == after
        old, new = before.model.remat, after.model.remat
        assert all(rank(getattr(new, tower)) >= rank(getattr(old, tower)) for tower in TOWERS)
        assert (new, after.grad_accum_steps) != (old, before.grad_accum_steps)
        assert after.grad_accum_steps in (before.grad_accum_steps, 2 * before.grad_accum_steps)
        model = dataclasses.replace(after.model, remat=config.model.remat)
        assert dataclasses.replace(after, model=model, grad_accum_steps=config.grad_accum_steps) == config
        before = after
    last = before
    assert all(getattr(last.model.remat, tower) == "full" for tower in TOWERS)
    assert last.grad_accum_steps * 2 > batch_size or batch_size % (last.grad_accum_steps * 2)


meshes = st.builds(
    dict, replica=st.integers(1, 4), data=st.sampled_from([-1, 1, 2, 8]), fsdp=st.integers(1, 64),
    sequence=st.integers(1, 4), tensor=st.integers(1, 4),
)  # fmt: skip
layouts = st.tuples(
    meshes, remats, st.sampled_from([1, 2, 4]), st.sampled_from(["layer", "step"]),
    st.sampled_from(["auto", "xla", "splash"]),
)  # fmt: skip


def make_layout(mesh, remat, accum, gather, attention) -> RunConfig:
    model = small_model(remat=RematConfig(**remat), attention=attention)
    return text_run(mesh=MeshConfig(**mesh), model=model, grad_accum_steps=accum, fsdp_gather=gather)


@given(layouts, layouts)
def test_the_overrides_between_two_layouts_turn_one_into_the_other(one, other) -> None:
    before, after = make_layout(*one), make_layout(*other)
    overrides = diff_overrides(before, after)
    assert apply(before, overrides) == after
    assert bool(overrides) == (before != after)
    assert len(overrides) == len(set(overrides))


def test_bigger_topologies() -> None:
    expected = {
        "v5e:16x16": "v5p:4x8x8", "v5e:2x4": "v5p:2x2x2", "v5e:2x2": "v5p:2x2x1", "v6e:4x4": "v5p:2x2x4",
        "tpu7x:4x4x4": "v5p:4x4x8", "v4:8x8x16": "v5p:8x8x16",
        "v5e:1x1": None, "v5p:4x4x4": None, "h100:8": None, "cpu:8": None,
    }  # fmt: skip
    bigger = {name: bigger_topology(parse_topology(name)) for name in expected}
    assert {name: topology.name if topology else None for name, topology in bigger.items()} == expected
    assert str(bigger_topology(parse_topology("v5e:4x4", 3))) == "v5p:2x2x4 x 3 slices"


@pytest.mark.parametrize("name", [n for n in topology_names() if n.split(":")[0] in ("v4", "v5e", "v6e", "tpu7x")])
def test_bigger_topologies_have_as_many_devices(name: str) -> None:
    topology = parse_topology(name)
    bigger = bigger_topology(topology)
    if bigger is not None:
        assert parse_topology(bigger.name) == bigger
        assert (bigger.devices, bigger.slices) == (topology.devices, topology.slices)
        assert bigger.chip.memory_bytes > topology.chip.memory_bytes


def test_libtpu_knows_the_smallest_bigger_topology() -> None:
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPU topologies, is not installed here")
    bigger = bigger_topology(parse_topology("v5e:2x2"))
    assert bigger is not None
    assert len(get_topology_devices(bigger)) == 4


def test_the_out_of_memory_message() -> None:
    buffers = [Buffer(1.5 * GIB, "f32[8,128]", "vision/mlp", 3)]
    oom = OutOfMemory(17.25 * GIB, 15.75 * GIB, 1.5 * GIB, buffers)
    first, *details = format_oom(oom, parse_topology("v5e:2x4"), buffers)
    assert first == "does not fit v5e:2x4: requires 17.25 GiB of 15.75 GiB per device, 1.50 GiB over"
    assert details == ["largest buffers:", "    1.50 GiB  3 x f32[8,128]  vision/mlp"]
    assert list(format_oom(oom, parse_topology("v5e:2x4"), [])) == [first]


def limit_memory(topology: Topology, memory_bytes: float) -> Topology:
    """Return the topology with less memory per chip."""
    return dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, memory_bytes=memory_bytes))


@pytest.mark.slow
def test_the_chip_s_memory_is_a_limit_where_the_compiler_has_none() -> None:
    cpu = parse_topology("cpu:8")
    program = trace_training(text_run(), cpu)
    assert isinstance(try_compile(program, 0.0), CompiledProgram)
    oom = try_compile(dataclasses.replace(program, topology=limit_memory(cpu, 1e4)), 0.0)
    assert isinstance(oom, OutOfMemory)
    assert oom.capacity == 1e4
    assert oom.exceeded_by == oom.required - oom.capacity > 0
    assert 0 < len(oom.largest) <= 8
    assert largest_buffers_on_bigger_chip(text_run(), cpu, trace_training, 0.0) == []


@pytest.mark.slow
def test_the_nearest_fit_is_the_first_change_that_fits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "absl")
    cpu, traced = parse_topology("cpu:8"), []

    def trace(config: RunConfig, topology: Topology):
        traced.append(config)
        return trace_training(config, topology)

    nearest = find_nearest_fit(text_run(batch_size=64), cpu, trace, 0.0)
    assert nearest is not None
    change, _ = nearest
    assert change.overrides == tuple(f"--config.model.remat.{tower}=dots" for tower in TOWERS)
    assert [r.getMessage() for r in caplog.records if r.name == "absl"] == [f"trying {' '.join(change.overrides)}"]
    assert traced == [change.config]
    # If nothing fits, it stops after max_attempts, or at microbatches that do not divide.
    assert find_nearest_fit(text_run(batch_size=8), limit_memory(cpu, 1e3), trace, 0.0, max_attempts=2) is None
    assert len(traced) == 3
    assert find_nearest_fit(text_run(batch_size=8), limit_memory(cpu, 1e3), trace_training, 0.0) is None
    with pytest.raises(UserError):
        trace_training(text_run(batch_size=8, grad_accum_steps=2), cpu)


@pytest.mark.slow
def test_libtpu_s_error_is_parsed() -> None:
    """Compile a batch that fits no v5e."""
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPU topologies, is not installed here")
    topology = parse_topology("v5e:2x2")
    oom = try_compile(trace_training(text_run(batch_size=2**26, mesh=MeshConfig(fsdp=4)), topology), -1.0)
    assert isinstance(oom, OutOfMemory)
    assert oom.exceeded_by > 0
    assert oom.required == pytest.approx(oom.capacity + oom.exceeded_by)
    assert oom.capacity == pytest.approx(CHIPS["v5e"].memory_bytes, rel=0.02)
