"""``plan.json``: a round trip, files of version 1, and errors that name the file."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.config import build, load_recipe
from mplug2_jax.errors import UserError
from mplug2_jax.parallel.accelerators import topology_names
from mplug2_jax.planning.plan_file import FORMAT_VERSION, PlanFile, read_plan
from mplug2_jax.training.config import RunConfig

GOOD: dict[str, Any] = {"config": "demo", "overrides": ["--config.grad_accum_steps=2"], "topology": "cpu:8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(
    config=st.text(), overrides=st.lists(st.text(), max_size=4), topology=st.sampled_from(topology_names()),
    predictions=st.dictionaries(st.text(), values, max_size=3),
)  # fmt: skip
def test_a_plan_survives_a_round_trip(folder: Path, config, overrides, topology, predictions) -> None:
    plan = PlanFile(config=config, overrides=tuple(overrides), topology=topology, predictions=predictions)
    plan.write(folder / "plan.json")
    assert read_plan(folder / "plan.json") == plan
    assert [path.name for path in folder.iterdir()] == ["plan.json"]  # and no partial file


def test_the_topology_has_its_slices(tmp_path: Path) -> None:
    PlanFile(config="demo", overrides=(), topology="v5p:4x4x4", slices=2).write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json").parsed_topology.chips == 128


def test_files_of_version_1_are_read(tmp_path: Path) -> None:
    old = {"overrides": ["--config.accumulate=2"], "slices": 1, "report": {"seconds": [1.0, 2.0]}, "format": 1}
    (tmp_path / "plan.json").write_text(json.dumps(GOOD | old))
    plan = read_plan(tmp_path / "plan.json")
    assert plan.predictions == {"seconds": [1.0, 2.0]}
    assert plan.format_version == FORMAT_VERSION
    assert build(RunConfig, load_recipe(plan.config, plan.overrides)).grad_accum_steps == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not a plan"),
        ("{", "is not a plan"),
        ("[" * 100_000, "is not a plan"),
        ("\xff", "is not a plan"),
        ("[]", "it has no topology"),
        ("null", "it has no topology"),
        ('"topology"', "it has no topology"),
        ("{}", "it has no topology; create plans with mplug2 plan --search --out"),
        (
            json.dumps(GOOD | {"format_version": FORMAT_VERSION + 1}),
            f"has format version {FORMAT_VERSION + 1}, expected at most {FORMAT_VERSION}: run mplug2 plan again",
        ),
        (json.dumps(GOOD | {"format": "new"}), "has format version 'new'"),
        (json.dumps(GOOD | {"topology": "v5x:8"}), "chip 'v5x' is unknown"),
        (json.dumps(GOOD | {"topology": "v5p:3x3x3"}), "multiples of 4 in every dimension: v5p:2x2x1"),
        (json.dumps(GOOD | {"topology": 8}), ".topology=8 is int, expected str"),
        (json.dumps(GOOD | {"slices": 2}), "--slices 2: expected at least 1, and more than 1 for TPUs only"),
        (json.dumps(GOOD | {"slices": "2"}), ".slices='2' is str, expected int"),
        (json.dumps(GOOD | {"slices": True}), ".slices=True is bool, expected int"),
        (json.dumps(GOOD | {"overrides": "--config.steps=1"}), "should be a tuple"),
        (json.dumps(GOOD | {"overrides": [1]}), ".overrides[0]=1 is int, expected str"),
        (json.dumps(GOOD | {"config": None}), ".config=None is NoneType, expected str"),
        (json.dumps({"topology": "cpu:8"}), "lacks config, overrides"),
        (json.dumps(GOOD | {"predictions": [1]}), "predictions=[1] should be a group of named values"),
        (json.dumps(GOOD | {"confg": "demo"}), ".confg is not a field: did you mean 'config'"),
    ],
)
def test_errors_name_the_file(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


def test_the_error_of_a_missing_plan_says_how_to_create_one(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"lost\.json does not exist; create it with mplug2 plan --search --out .*lost\.json"
    ):
        read_plan(tmp_path / "lost.json")
