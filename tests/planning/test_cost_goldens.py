"""The ledger: what counts as growth, the file there and back, and the shipped one."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.config import build, load_recipe
from mplug2_jax.errors import UserError
from mplug2_jax.parallel.accelerators import parse_topology
from mplug2_jax.planning.cost_goldens import (
    Entry,
    Figures,
    growth,
    ledger_path,
    read_ledger,
    row,
    with_figures,
    write_ledger,
)
from mplug2_jax.training.config import RunConfig

MIB = 2.0**20
AXES = ("ici fsdp", "ici data x fsdp", "dcn replica")


def figures(memory: float = 0.0, **traffic: float) -> Figures:
    return Figures(memory=memory, traffic=traffic, flops=1e15, compile_seconds=1.0, compiler="0.0.40")


sizes = st.floats(0, 2.0**40)
traffics = st.dictionaries(st.sampled_from(AXES), sizes, max_size=3)


@given(sizes, traffics, st.floats(0, 0.0099))
def test_less_than_a_hundredth_more_is_no_growth(memory: float, traffic: dict[str, float], share: float) -> None:
    after = figures(memory * (1 + share), **{name: size * (1 + share) for name, size in traffic.items()})
    assert growth(figures(memory, **traffic), after) == []


@given(sizes, traffics, st.floats(0, MIB - 1))
def test_nor_is_less_than_a_mebibyte(memory: float, traffic: dict[str, float], more: float) -> None:
    after = figures(memory + more, **{name: size + more for name, size in traffic.items()})
    assert growth(figures(memory, **traffic), after) == []


@given(sizes, traffics, traffics)
def test_less_is_never_growth(memory: float, traffic: dict[str, float], gone: dict[str, float]) -> None:
    after = figures(memory / 2, **{name: min(size, gone.get(name, 0.0)) for name, size in traffic.items()})
    assert growth(figures(memory, **traffic), after) == []


@given(sizes, st.sampled_from(["memory", *AXES]), st.floats(0.0101, 10))
def test_a_hundredth_and_a_mebibyte_more_is(before: float, where: str, share: float) -> None:
    after = before * (1 + share) + MIB + 1
    old, new = (figures(x) if where == "memory" else figures(0.0, **{where: x}) for x in (before, after))
    (line,) = growth(old, new)
    assert line.startswith(f"{where if where == 'memory' else f'traffic on {where}'}: ")
    assert f"{after:,.0f}" in line


def test_both_bounds_must_be_passed_and_neither_adds_to_the_other() -> None:
    assert growth(figures(100 * MIB), figures(101.5 * MIB)) == ["memory: 104,857,600 to 106,430,464 bytes (+1.5%)"]
    assert growth(figures(1000 * MIB), figures(1009 * MIB)) == []
    assert growth(figures(), figures(**{"dcn replica": 2e9})) == ["traffic on dcn replica: 2,000,000,000 bytes are new"]


entries = st.fixed_dictionaries({
    "recipe": st.text(), "topology": st.text(), "slices": st.integers(1, 4), "quick": st.booleans(),
    "evaluation": st.text(), "overrides": st.lists(st.text(), max_size=3),
    "figures": st.none() | st.fixed_dictionaries({
        "memory": sizes, "traffic": traffics, "flops": sizes, "compile_seconds": sizes, "compiler": st.text(),
    }),
})  # fmt: skip


@given(st.lists(entries, max_size=3))
def test_a_ledger_comes_back_as_it_went(tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, Any]]) -> None:
    written = [build(Entry, value) for value in values]
    path = tmp_path_factory.getbasetemp() / "ledger.json"
    write_ledger(written, path)
    assert read_ledger(path) == written


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[" * 100_000, "3", "null", "[3]", "[null]", '["recipe"]', "[{}]", '{"recipe": "demo"}',
        '[{"recipe": "demo", "topology": 3}]', '[{"recipe": "demo", "topology": "cpu:8", "figures": 3}]',
        '[{"recipe": "demo", "topology": "cpu:8", "figures": {"memory": "much"}}]',
    ],
    ids=range(13),
)  # fmt: skip
def test_what_is_no_ledger_is_refused_by_its_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_ledger(path)
    assert str(path) in str(caught.value)


def test_an_entry_and_its_row_are_for_people() -> None:
    entry = Entry(recipe="pretrain:large", topology="v5p:8x8x8", slices=2, evaluation="video")
    assert str(entry) == "pretrain:large video evaluation on v5p:8x8x8 x 2 slices"
    measured = figures(3 * 2.0**30, **{"ici fsdp": 1.5e9, "dcn replica": 1e9})
    assert row(entry, measured) == (str(entry), "3.00", "2.50", "1.00", "1")
    assert with_figures(entry, measured).figures == measured


def test_every_shipped_entry_is_of_a_recipe_and_a_machine_that_exist() -> None:
    path = ledger_path()
    shipped = read_ledger(path)
    assert any(entry.quick for entry in shipped)
    for entry in shipped:
        config = build(RunConfig, load_recipe(entry.recipe, entry.overrides))
        config.mesh.axis_sizes(parse_topology(entry.topology, entry.slices).devices)
        assert not entry.evaluation or entry.evaluation in config.evaluations
    assert json.loads(path.read_text())


@pytest.mark.slow
def test_the_quick_entries_cost_no_more_than_the_ledger_says() -> None:
    """In a process of its own: here programs are not optimised."""
    measured = {entry.figures.compiler for entry in read_ledger(ledger_path()) if entry.quick and entry.figures}
    if measured != {version("libtpu")}:
        pytest.skip(f"the ledger is of libtpu {', '.join(measured)}, here is {version('libtpu')}")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-m", "mplug2_jax.cli.main", "plan", "--ledger", "quick"], env=ours, capture_output=True,
        text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finetune:caption,tiny on v5e:2x2" in done.stdout
