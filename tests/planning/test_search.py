"""The search: its candidates, their order, and a result that is never worse than the recipe's own layout."""

import dataclasses
import logging
from pathlib import Path

import jax
import pytest

from mplug2_jax.config import as_recipe, build, override
from mplug2_jax.parallel.accelerators import parse_topology
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.planning import search as module
from mplug2_jax.planning.programs import CompiledProgram, TracedProgram
from mplug2_jax.planning.search import Candidate, Trial, rank_candidates, search
from mplug2_jax.training.config import RunConfig
from tests.runs import text_run

TOPOLOGY = parse_topology("cpu:8")


@pytest.fixture(scope="module")
def candidates() -> list[Candidate]:
    return rank_candidates(text_run(mesh=MeshConfig(fsdp=8)), TOPOLOGY)


def test_the_recipe_s_own_layout_is_first_and_the_others_are_sorted(candidates: list[Candidate]) -> None:
    first, *others = candidates
    assert first.overrides == ()
    assert others
    assert all(candidate.overrides for candidate in others)
    order = [(c.step_seconds, c.memory_bytes) for c in others]
    assert order == sorted(order)
    assert len({c.config.model for c in candidates}) > 1
    assert {c.config.fsdp_gather for c in candidates} == {"layer", "step"}


def test_candidates_divide_devices_heads_and_batches(candidates: list[Candidate]) -> None:
    recipe = candidates[0].config
    for candidate in candidates:
        config = candidate.config
        sizes = config.mesh.axis_sizes(8)
        shards = sizes["replica"] * sizes["data"] * sizes["fsdp"]
        assert config.streams == recipe.streams
        assert 8 % (shards * config.grad_accum_steps) == 0
        assert config.model.heads % sizes["tensor"] == 0
        assert sizes["sequence"] == 1  # no long video clips
        assert not (config.fsdp_gather == "step" and sizes["fsdp"] == 1)
        assert candidate.memory_bytes <= TOPOLOGY.chip.memory_bytes


def test_their_overrides_reproduce_them_and_differ(candidates: list[Candidate]) -> None:
    recipe = candidates[0].config
    for candidate in candidates[:: max(1, len(candidates) // 20)]:
        assert build(RunConfig, override(as_recipe(recipe), candidate.overrides)) == candidate.config
    assert len({candidate.overrides for candidate in candidates}) == len(candidates)
    assert len({str(candidate) for candidate in candidates}) > len(candidates) / 4


def test_an_inferred_axis_is_no_separate_layout(candidates: list[Candidate]) -> None:
    """Check that fsdp=-1 on 8 devices is the layout fsdp=8."""
    inferred = rank_candidates(text_run(), TOPOLOGY)
    assert inferred[0].overrides == ()
    assert len(inferred) == len(candidates)


def test_layouts_that_do_not_fit_are_last(candidates: list[Candidate]) -> None:
    fast, slow = (Trial(candidates[0], step_seconds=seconds) for seconds in ((1.0, 3.0), (1e6, 1e6)))
    too_large = Trial(candidates[0], "does not fit")
    assert fast.mean_seconds == 2.0
    assert slow.mean_seconds < too_large.mean_seconds
    assert (fast.outcome, too_large.outcome) == ("1,000 to 3,000 ms", "does not fit")


@pytest.mark.slow
def test_a_layout_that_does_not_compile_is_not_chosen(
    candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(program: TracedProgram, effort: float) -> CompiledProgram:
        if program.spec.config == candidates[0].config:
            return program.compile(effort)
        raise jax.errors.JaxRuntimeError("INTERNAL: no such luck\nat line 1")

    monkeypatch.setattr(module, "rank_candidates", lambda *_: candidates[:3])
    monkeypatch.setattr(module, "try_compile", fail)
    best, *others = search(candidates[0].config, TOPOLOGY, seconds=600.0, effort=0.0)
    assert (best.candidate, best.error) == (candidates[0], "")
    assert [t.error for t in others] == ["does not compile: INTERNAL: no such luck"] * 2


@pytest.mark.slow
def test_the_best_is_never_worse_than_the_recipe_s_own_and_is_cached(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "absl")
    config = text_run(mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    first = search(config, TOPOLOGY, seconds=15.0, effort=0.0, cache_dir=tmp_path)
    assert len([record for record in caplog.records if record.name == "absl"]) == 1 + len(first)
    unchanged = next(t for t in first if not t.candidate.overrides)
    assert [t.mean_seconds for t in first] == sorted(t.mean_seconds for t in first)
    assert first[0].mean_seconds <= unchanged.mean_seconds
    assert not any(t.cached for t in first)
    assert len(list(tmp_path.glob("*.json"))) == len(first)
    assert not list(tmp_path.glob("*.partial"))

    second = search(config, TOPOLOGY, seconds=15.0, effort=0.0, cache_dir=tmp_path)
    known = {str(t.candidate): t for t in first}
    repeated = [t for t in second if str(t.candidate) in known]
    assert repeated
    for t in repeated:
        assert t.cached
        assert dataclasses.replace(t, cached=False) == known[str(t.candidate)]
    other = search(config, TOPOLOGY, seconds=0.0, effort=0.5, cache_dir=tmp_path)
    assert [t.cached for t in other] == [False]  # efforts are cached separately; one layout is always tried
