"""Changes that leave a curve alone: their order, their words, and what is said of a program that does not fit."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.config import as_recipe, build, override
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import RematConfig
from mplug2_jax.parallel.accelerators import CHIPS, Topology, parse_topology, topology_names
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.planning.oom import Buffer, OutOfMemory
from mplug2_jax.planning.programs import Compiled, get_topology_devices, training_program
from mplug2_jax.planning.remedies import (
    changes,
    largest_if_there_were_room,
    nearest_that_fits,
    oom_lines,
    overrides_between,
    same_number,
    try_compile,
)
from mplug2_jax.training.config import RunConfig
from tests.runs import small_model, small_run

GIB = 2.0**30
TOWERS = ("vision", "text", "fusion", "decoder")


def texts(batch_size: int = 8, **fields) -> RunConfig:
    chosen = small_run().streams["text"]
    data = dataclasses.replace(chosen.data, batch_size=batch_size)
    chosen = dataclasses.replace(chosen, data=data, objectives={"mlm": 1.0})
    return small_run(**({"streams": {"text": chosen}, "evaluations": {}} | fields))


def applied(before: RunConfig, words: tuple[str, ...]) -> RunConfig:
    """What the command line makes of a recipe and some words."""
    return build(RunConfig, override(as_recipe(before), words))


def test_more_is_computed_again_before_batches_are_cut() -> None:
    found = [change.overrides for change in changes(texts())]
    every = {kind: tuple(f"--config.model.remat.{tower}={kind}" for tower in TOWERS) for kind in ("dots", "full")}
    assert found == [
        every["dots"],
        ("--config.model.remat.vision=full", *every["dots"][1:]),
        every["full"],
        *((*every["full"], f"--config.grad_accum_steps={times}") for times in (2, 4, 8)),
    ]


remats = st.builds(dict, **dict.fromkeys(TOWERS, st.sampled_from(["none", "dots", "full"])))


@given(remats, st.sampled_from([1, 2, 4, 8]), st.sampled_from([8, 12, 24]))
def test_changes_need_less_and_leave_the_rest_alone(remat: dict[str, str], times: int, batch_size: int) -> None:
    if batch_size % times:
        times = 1
    config = texts(batch_size, model=small_model(remat=RematConfig(**remat)), grad_accum_steps=times)
    rank = ("none", "dots", "full").index
    before = config
    for change in changes(config):
        after = change.config
        assert change.overrides
        assert applied(config, change.overrides) == after
        kept, now = before.model.remat, after.model.remat
        assert all(rank(getattr(now, tower)) >= rank(getattr(kept, tower)) for tower in TOWERS)
        assert (now, after.grad_accum_steps) != (kept, before.grad_accum_steps)
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


def laid_out(mesh, remat, accumulate, gather, attention) -> RunConfig:
    model = small_model(remat=RematConfig(**remat), attention=attention)
    return texts(mesh=MeshConfig(**mesh), model=model, grad_accum_steps=accumulate, fsdp_gather=gather)


@given(layouts, layouts)
def test_the_words_between_two_layouts_turn_one_into_the_other(one, other) -> None:
    before, after = laid_out(*one), laid_out(*other)
    words = overrides_between(before, after)
    assert applied(before, words) == after
    assert bool(words) == (before != after)
    assert len(words) == len(set(words))


def test_as_many_of_a_larger_chip() -> None:
    expected = {
        "v5e:16x16": "v5p:4x8x8", "v5e:2x4": "v5p:2x2x2", "v5e:2x2": "v5p:2x2x1", "v6e:4x4": "v5p:2x2x4",
        "tpu7x:4x4x4": "v5p:4x4x8", "v4:8x8x16": "v5p:8x8x16",
        "v5e:1x1": None, "v5p:4x4x4": None, "h100:8": None, "cpu:8": None,
    }  # fmt: skip
    found = {name: same_number(parse_topology(name)) for name in expected}
    assert {name: roomy.name if roomy else None for name, roomy in found.items()} == expected
    assert str(same_number(parse_topology("v5e:4x4", 3))) == "v5p:2x2x4 x 3 slices"


@pytest.mark.parametrize("name", [n for n in topology_names() if n.split(":")[0] in ("v4", "v5e", "v6e", "tpu7x")])
def test_there_are_as_many_of_the_larger_chip(name: str) -> None:
    topology = parse_topology(name)
    roomy = same_number(topology)
    if roomy is not None:
        assert parse_topology(roomy.name) == roomy
        assert (roomy.devices, roomy.slices) == (topology.devices, topology.slices)
        assert roomy.chip.memory_bytes > topology.chip.memory_bytes


def test_libtpu_knows_the_smallest_of_them() -> None:
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPU topologies, is not installed here")
    roomy = same_number(parse_topology("v5e:2x2"))
    assert roomy is not None
    assert len(get_topology_devices(roomy)) == 4


def test_a_refusal_in_words() -> None:
    largest = [Buffer(1.5 * GIB, "f32[8,128]", "vision/mlp", 3)]
    out = OutOfMemory(17.25 * GIB, 15.75 * GIB, 1.5 * GIB, largest)
    first, *rest = oom_lines(out, parse_topology("v5e:2x4"), largest)
    assert first == "it does not fit v5e:2x4: it needs 17.25 GiB of a device's 15.75 GiB, 1.50 GiB too many"
    assert rest == ["largest arrays:", "    1.50 GiB  3 x f32[8,128]  vision/mlp"]
    assert list(oom_lines(out, parse_topology("v5e:2x4"), [])) == [first]


def tight(topology: Topology, memory: float) -> Topology:
    """The topology, of chips with less memory."""
    return dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, memory=memory))


@pytest.mark.slow
def test_where_the_compiler_does_not_mind_the_chip_s_memory_is_the_limit() -> None:
    cpu = parse_topology("cpu:8")
    program = training_program(texts(), cpu)
    roomy = try_compile(program, 0.0)
    assert isinstance(roomy, Compiled)
    out = try_compile(dataclasses.replace(program, topology=tight(cpu, 1e4)), 0.0)
    assert isinstance(out, OutOfMemory)
    assert out.capacity == 1e4
    assert out.exceeded_by == out.needed - out.capacity > 0
    assert 0 < len(out.largest) <= 8
    assert largest_if_there_were_room(texts(), cpu, training_program, 0.0) == []


@pytest.mark.slow
def test_the_nearest_change_that_fits_is_the_first_that_does() -> None:
    cpu, said, traced = parse_topology("cpu:8"), [], []

    def trace(config: RunConfig, topology: Topology):
        traced.append(config)
        return training_program(config, topology)

    found = nearest_that_fits(texts(64), cpu, trace, 0.0, said.append)
    assert found is not None
    assert found[0].overrides == tuple(f"--config.model.remat.{tower}=dots" for tower in TOWERS)
    assert said == [f"trying {' '.join(found[0].overrides)}"]
    assert traced == [found[0].config]
    # Of nothing that fits, as many are tried as asked for; micro-batches that do not split end it.
    assert nearest_that_fits(texts(8), tight(cpu, 1e3), trace, 0.0, said.append, most=2) is None
    assert len(traced) == 3
    assert nearest_that_fits(texts(8), tight(cpu, 1e3), training_program, 0.0, said.append) is None
    with pytest.raises(UserError):
        training_program(texts(8, grad_accum_steps=2), cpu)


@pytest.mark.slow
def test_libtpu_s_refusal_is_read() -> None:
    """A batch that no v5e has room for."""
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPU topologies, is not installed here")
    topology = parse_topology("v5e:2x2")
    out = try_compile(training_program(texts(2**26, mesh=MeshConfig(fsdp=4)), topology), -1.0)
    assert isinstance(out, OutOfMemory)
    assert out.exceeded_by > 0
    assert out.needed == pytest.approx(out.capacity + out.exceeded_by)
    assert out.capacity == pytest.approx(CHIPS["v5e"].memory_bytes, rel=0.02)
