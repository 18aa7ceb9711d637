"""``plan.json``: it comes back as it went, and whatever is no plan is refused by the file's name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.errors import UserError
from mplug2_jax.parallel.accelerators import topology_names
from mplug2_jax.planning.plan_file import FORMAT, PlanFile, read_plan

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
    report=st.dictionaries(st.text(), values, max_size=3),
)  # fmt: skip
def test_a_plan_comes_back_as_it_went(folder: Path, config, overrides, topology, report) -> None:
    plan = PlanFile(config=config, overrides=tuple(overrides), topology=topology, report=report)
    plan.write(folder / "plan.json")
    assert read_plan(folder / "plan.json") == plan
    assert [path.name for path in folder.iterdir()] == ["plan.json"]  # and nothing half written beside it


def test_its_machine_has_its_slices(tmp_path: Path) -> None:
    PlanFile(config="demo", overrides=(), topology="v5p:4x4x4", slices=2).write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json").machine.chips == 128


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not a plan"),
        ("{", "is not a plan"),
        ("[" * 100_000, "is not a plan"),
        ("\xff", "is not a plan"),
        ("[]", "it has no topology"),
        ("null", "it has no topology"),
        ('"topology"', "it has no topology"),
        ("{}", "it has no topology; mplug2 plan --search --out writes plans"),
        (
            json.dumps(GOOD | {"format": FORMAT + 1}),
            f"has format {FORMAT + 1}, this version reads {FORMAT}: plan again",
        ),
        (json.dumps(GOOD | {"format": "new"}), "has format new"),
        (json.dumps(GOOD | {"topology": "v5x:8"}), "chip 'v5x' is unknown"),
        (json.dumps(GOOD | {"topology": "v5p:3x3x3"}), "cubes of 4x4x4: v5p:2x2x1"),
        (json.dumps(GOOD | {"topology": 8}), ".topology=8 is int, expected str"),
        (json.dumps(GOOD | {"slices": 2}), "--slices 2: expected at least 1, and more than 1 for TPUs only"),
        (json.dumps(GOOD | {"slices": "2"}), ".slices='2' is str, expected int"),
        (json.dumps(GOOD | {"slices": True}), ".slices=True is bool, expected int"),
        (json.dumps(GOOD | {"overrides": "--config.steps=1"}), "should be a tuple"),
        (json.dumps(GOOD | {"overrides": [1]}), ".overrides[0]=1 is int, expected str"),
        (json.dumps(GOOD | {"config": None}), ".config=None is NoneType, expected str"),
        (json.dumps({"topology": "cpu:8"}), "lacks config, overrides"),
        (json.dumps(GOOD | {"report": [1]}), "its report should be a group of named values"),
        (json.dumps(GOOD | {"confg": "demo"}), ".confg is not a field: did you mean 'config'"),
    ],
)
def test_what_is_no_plan_is_refused_by_the_files_name(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)
    assert why in str(caught.value)


def test_a_missing_plan_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"lost\.json does not exist; mplug2 plan --search --out .*lost\.json makes one"
    ):
        read_plan(tmp_path / "lost.json")
