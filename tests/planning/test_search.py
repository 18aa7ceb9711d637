"""The search: what is a candidate, in which order, and that its best is never worse than the recipe's own."""

import dataclasses
from pathlib import Path

import jax
import pytest

from mplug2_jax.config import as_recipe, build, override
from mplug2_jax.parallel.accelerators import parse_topology
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.planning import search as module
from mplug2_jax.planning.programs import Compiled, Program
from mplug2_jax.planning.search import Candidate, Tried, candidates, search
from mplug2_jax.training.config import RunConfig
from tests.runs import small_run

TOPOLOGY = parse_topology("cpu:8")


def texts(**fields) -> RunConfig:
    chosen = dataclasses.replace(small_run().streams["text"], objectives={"mlm": 1.0})
    return small_run(**({"streams": {"text": chosen}, "evaluations": {}} | fields))


@pytest.fixture(scope="module")
def found() -> list[Candidate]:
    return candidates(texts(mesh=MeshConfig(fsdp=8)), TOPOLOGY)


def test_the_recipe_s_own_is_first_and_the_rest_are_sorted(found: list[Candidate]) -> None:
    own, *varied = found
    assert own.overrides == ()
    assert varied
    assert all(candidate.overrides for candidate in varied)
    assert [(c.seconds, c.memory) for c in varied] == sorted((c.seconds, c.memory) for c in varied)
    assert len({c.config.model for c in found}) > 1
    assert {c.config.fsdp_gather for c in found} == {"layer", "step"}


def test_candidates_divide_devices_heads_and_batches(found: list[Candidate]) -> None:
    own = found[0].config
    for candidate in found:
        config = candidate.config
        sizes = config.mesh.axis_sizes(8)
        shards = sizes["replica"] * sizes["data"] * sizes["fsdp"]
        assert config.streams == own.streams
        assert 8 % (shards * config.grad_accum_steps) == 0
        assert config.model.heads % sizes["tensor"] == 0
        assert sizes["sequence"] == 1  # there are no long clips
        assert not (config.fsdp_gather == "step" and sizes["fsdp"] == 1)
        assert candidate.memory <= TOPOLOGY.chip.memory_bytes


def test_their_words_make_them_and_no_two_are_the_same(found: list[Candidate]) -> None:
    own = found[0].config
    for candidate in found[:: max(1, len(found) // 20)]:
        assert build(RunConfig, override(as_recipe(own), candidate.overrides)) == candidate.config
    assert len({candidate.overrides for candidate in found}) == len(found)
    assert len({str(candidate) for candidate in found}) > len(found) / 4


def test_an_open_axis_is_the_size_that_it_has(found: list[Candidate]) -> None:
    """fsdp=-1 on 8 devices is fsdp=8: not another layout to compile."""
    opened = candidates(texts(), TOPOLOGY)
    assert opened[0].overrides == ()
    assert len(opened) == len(found)


def test_what_does_not_fit_scores_worst(found: list[Candidate]) -> None:
    def tried(trouble: str, *seconds: float) -> Tried:
        return Tried(found[0], trouble, 1.0, seconds, 0.0, 0.0, 1.0, cached=False)  # type: ignore[arg-type]

    assert tried("", 1.0, 3.0).score == 2.0
    assert tried("", 1e6, 1e6).score < tried("does not fit", 0.0, 0.0).score
    assert (tried("", 1.0, 3.0).time, tried("does not fit", 0.0, 0.0).time) == ("1,000 to 3,000 ms", "does not fit")


@pytest.mark.slow
def test_a_layout_that_the_compiler_refuses_is_one_that_is_not_chosen(
    found: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(program: Program, effort: float) -> Compiled:
        if program.spec.config == found[0].config:
            return program.compile(effort)
        raise jax.errors.JaxRuntimeError("INTERNAL: no such luck\nat line 1")

    monkeypatch.setattr(module, "candidates", lambda *_: found[:3])
    monkeypatch.setattr(module, "try_compile", refuse)
    own, *others = search(found[0].config, TOPOLOGY, seconds=600.0, effort=0.0, say=print)
    assert (own.candidate, own.trouble) == (found[0], "")
    assert [t.trouble for t in others] == ["does not compile: INTERNAL: no such luck"] * 2


@pytest.mark.slow
def test_the_best_is_never_worse_than_the_recipe_s_own_and_is_found_again(tmp_path: Path) -> None:
    config, said = texts(mesh=MeshConfig(data=2, fsdp=2, tensor=2)), []
    first = search(config, TOPOLOGY, seconds=15.0, effort=0.0, say=said.append, cache=tmp_path)
    assert len(said) == 1 + len(first)
    own = next(t for t in first if not t.candidate.overrides)
    assert [t.score for t in first] == sorted(t.score for t in first)
    assert first[0].score <= own.score
    assert not any(t.cached for t in first)
    assert len(list(tmp_path.glob("*.json"))) == len(first)
    assert not list(tmp_path.glob("*.partial"))

    again = search(config, TOPOLOGY, seconds=15.0, effort=0.0, say=said.append, cache=tmp_path)
    known = {str(t.candidate): t for t in first}
    before = [t for t in again if str(t.candidate) in known]
    assert before
    for t in before:
        assert t.cached
        assert dataclasses.replace(t, cached=False) == known[str(t.candidate)]
    other = search(config, TOPOLOGY, seconds=0.0, effort=0.5, say=said.append, cache=tmp_path)
    assert [t.cached for t in other] == [False]  # another effort is another program; one is always tried
