"""Cost goldens: regressions, the file's round trip, and the shipped file."""

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
    CostGolden,
    MeasuredCosts,
    find_regressions,
    format_row,
    goldens_path,
    read_goldens,
    write_goldens,
)
from mplug2_jax.training.config import RunConfig

MIB = 2.0**20
AXES = ("ici fsdp", "ici data x fsdp", "dcn replica")


def costs(memory: float = 0.0, hbm: float = 0.0, **traffic: float) -> MeasuredCosts:
    return MeasuredCosts(
        memory_bytes=memory, hbm_bytes=hbm, traffic_bytes=traffic, flops=1e15, compile_seconds=1.0, libtpu="0.0.40"
    )  # fmt: skip


sizes = st.floats(0, 2.0**40)
traffics = st.dictionaries(st.sampled_from(AXES), sizes, max_size=3)


@given(sizes, traffics, st.floats(0, 0.0099))
def test_less_than_1_percent_more_passes(memory: float, traffic: dict[str, float], share: float) -> None:
    after = costs(memory * (1 + share), **{name: size * (1 + share) for name, size in traffic.items()})
    assert find_regressions(costs(memory, **traffic), after) == []


@given(sizes, traffics, st.floats(0, MIB - 1))
def test_less_than_1_mebibyte_more_passes(memory: float, traffic: dict[str, float], more: float) -> None:
    after = costs(memory + more, **{name: size + more for name, size in traffic.items()})
    assert find_regressions(costs(memory, **traffic), after) == []


@given(sizes, traffics, traffics)
def test_less_passes(memory: float, traffic: dict[str, float], limits: dict[str, float]) -> None:
    after = costs(memory / 2, **{name: min(size, limits.get(name, 0.0)) for name, size in traffic.items()})
    assert find_regressions(costs(memory, **traffic), after) == []


@given(sizes, st.sampled_from(["memory", "HBM traffic", *AXES]), st.floats(0.0101, 10))
def test_1_percent_and_1_mebibyte_more_is_a_regression(before: float, name: str, share: float) -> None:
    after = before * (1 + share) + MIB + 1
    argument = {"memory": "memory", "HBM traffic": "hbm"}.get(name, name)
    (line,) = find_regressions(*(costs(**{argument: size}) for size in (before, after)))
    assert line.startswith(f"{f'traffic on {name}' if name in AXES else name}: ")
    assert f"{after:,.0f}" in line


def test_both_limits_must_be_exceeded() -> None:
    assert find_regressions(costs(100 * MIB), costs(101.5 * MIB)) == [
        "memory: 104,857,600 to 106,430,464 bytes (+1.5%)"
    ]
    assert find_regressions(costs(1000 * MIB), costs(1009 * MIB)) == []
    assert find_regressions(costs(), costs(**{"dcn replica": 2e9})) == [
        "traffic on dcn replica: 2,000,000,000 bytes, were 0"
    ]


entries = st.fixed_dictionaries({
    "recipe": st.text(), "topology": st.text(), "slices": st.integers(1, 4), "quick": st.booleans(),
    "evaluation": st.text(), "overrides": st.lists(st.text(), max_size=3),
    "costs": st.none() | st.fixed_dictionaries({
        "memory_bytes": sizes, "hbm_bytes": sizes, "traffic_bytes": traffics, "flops": sizes,
        "compile_seconds": sizes, "libtpu": st.text(),
    }),
})  # fmt: skip


@given(st.lists(entries, max_size=3))
def test_goldens_survive_a_round_trip(tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, Any]]) -> None:
    written = [build(CostGolden, value) for value in values]
    path = tmp_path_factory.getbasetemp() / "goldens.json"
    write_goldens(written, path)
    assert read_goldens(path) == written


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[" * 100_000, "3", "null", "[]", "{}", '{"programs": 3}', '{"programs": [3]}', '{"programs": [null]}',
        '{"programs": ["recipe"]}', '{"programs": [{}]}', '{"programs": [{"recipe": "demo", "topology": 3}]}',
        '{"programs": [{"recipe": "demo", "topology": "cpu:8", "costs": 3}]}',
        '{"programs": [{"recipe": "demo", "topology": "cpu:8", "costs": {"memory_bytes": "much"}}]}',
    ],
    ids=range(15),
)  # fmt: skip
def test_errors_name_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_goldens(path)
    assert str(path) in str(caught.value)


def test_the_row_of_a_golden() -> None:
    golden = CostGolden(recipe="pretrain:large", topology="v5p:8x8x8", slices=2, evaluation="video")
    assert str(golden) == "pretrain:large video evaluation on v5p:8x8x8 x 2 slices"
    measured = costs(3 * 2.0**30, 7e9, **{"ici fsdp": 1.5e9, "dcn replica": 1e9})
    assert format_row(golden, measured) == (str(golden), "3.00", "7.00", "2.50", "1.00", "1")


def test_recipes_and_topologies_of_shipped_goldens_exist() -> None:
    goldens = read_goldens(goldens_path())
    assert any(golden.quick for golden in goldens)
    for golden in goldens:
        config = build(RunConfig, load_recipe(golden.recipe, golden.overrides))
        config.mesh.axis_sizes(parse_topology(golden.topology, golden.slices).devices)
        assert not golden.evaluation or golden.evaluation in config.evaluations


@pytest.mark.slow
def test_the_quick_goldens_have_no_regressions() -> None:
    """Run in a separate process: programs of this one are not optimized."""
    versions = {golden.costs.libtpu for golden in read_goldens(goldens_path()) if golden.quick and golden.costs}
    if versions != {version("libtpu")}:
        pytest.skip(f"the goldens are of libtpu {', '.join(versions)}, this is {version('libtpu')}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-m", "mplug2_jax.cli.main", "plan", "--cost-goldens", "quick"], env=environment,
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finetune:caption,tiny on v5e:2x2" in done.stdout
