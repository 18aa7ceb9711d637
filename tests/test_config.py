"""From recipes to dataclasses: round trips, overrides of every type, and errors."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from mplug2_jax.config import as_recipe, build, find_recipe, load_recipe, override, recipe_folder
from mplug2_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    kind: Literal["soft", "hard"] = "soft"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    steps: int = 3
    exact: bool = False
    words: tuple[str, ...] = ("a", "b")
    sizes: tuple[int, ...] = ()
    peak: float | None = None
    inner: Inner = Inner()
    maybe: Inner | None = None
    table: Mapping[str, Inner] = dataclasses.field(default_factory=dict)
    chosen: Mapping[Literal["left", "right"], float] = dataclasses.field(default_factory=dict)


def recipe(**fields: Any) -> ConfigDict:
    return as_recipe(Outer(**({"name": "x", "table": {"one": Inner()}} | fields)))


def build_with(*overrides: str) -> Outer:
    """Build the recipe with overrides."""
    return build(Outer, override(recipe(), [f"--config.{text}" for text in overrides]))


inners = st.builds(Inner, rate=st.floats(allow_nan=False), kind=st.sampled_from(["soft", "hard"]))
names = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1).filter(str.isidentifier)
outers = st.builds(
    Outer, name=st.text(), steps=st.integers(), exact=st.booleans(), words=st.lists(st.text()).map(tuple),
    sizes=st.lists(st.integers()).map(tuple), peak=st.none() | st.floats(allow_nan=False), inner=inners,
    maybe=st.none() | inners, table=st.dictionaries(names, inners, max_size=3),
    chosen=st.dictionaries(st.sampled_from(["left", "right"]), st.floats(allow_nan=False)),
)  # fmt: skip


@given(outers)
def test_a_dataclass_round_trips_through_a_recipe(value: Outer) -> None:
    assert build(Outer, as_recipe(value)) == value
    assert build(Outer, as_recipe(value).to_dict()) == value


@pytest.mark.parametrize("name", ["demo", "released", "released:caption", "released:videoqa,tiny"])
def test_shipped_recipes_round_trip_through_dataclasses_and_json(name: str) -> None:
    from mplug2_jax.training.config import RunConfig

    config = build(RunConfig, load_recipe(name))
    assert build(RunConfig, as_recipe(config)) == config
    assert build(RunConfig, json.loads(json.dumps(as_recipe(config).to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nam": "x"}, "config.nam is not a field: did you mean 'name'?"),
        ({}, "config lacks name"),
        ({"name": 3}, "config.name=3 is int, expected str"),
        ({"name": "x", "steps": 2.0}, "config.steps=2.0 is float, expected int"),
        ({"name": "x", "steps": True}, "config.steps=True is bool, expected int"),
        ({"name": "x", "exact": 1}, "config.exact=1 is int, expected bool"),
        ({"name": "x", "peak": "high"}, "config.peak='high' is str, expected float"),
        ({"name": "x", "peak": False}, "config.peak=False is bool, expected float"),
        ({"name": "x", "words": "ab"}, "config.words='ab' should be a tuple"),
        ({"name": "x", "words": 3}, "config.words=3 should be a tuple"),
        ({"name": "x", "words": ("a", 3)}, "config.words[1]=3 is int, expected str"),
        ({"name": "x", "inner": 3}, "config.inner=3 should be a group of fields (Inner)"),
        ({"name": "x", "inner": {"rat": 1}}, "config.inner.rat is not a field: did you mean 'rate'?"),
        ({"name": "x", "inner": {"kind": "sof"}}, "config.inner.kind='sof': did you mean 'soft'? (valid: hard, soft)"),
        ({"name": "x", "maybe": {"rate": None}}, "config.maybe.rate=None is NoneType, expected float"),
        ({"name": "x", "table": [1]}, "config.table=[1] should be a group of named values"),
        ({"name": "x", "table": {"one": {"rate": "r"}}}, "config.table.one.rate='r' is str, expected float"),
        ({"name": "x", "chosen": {"lef": 1.0}}, "config.chosen.lef is not a field: did you mean 'left'?"),
    ],
)
def test_invalid_values_are_refused_with_their_path(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(Outer, values)
    assert message in str(caught.value)


def test_integers_are_accepted_as_floats() -> None:
    value = build(Outer, {"name": "x", "peak": 3, "inner": {"rate": 1}})
    assert (type(value.peak), type(value.inner.rate)) == (float, float)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("steps=7", "steps", 7),
        ("steps=-7", "steps", -7),
        ("steps=1_000", "steps", 1000),
        ("exact=true", "exact", True),
        ("exact=False", "exact", False),
        ("name=other", "name", "other"),
        ("name=", "name", ""),
        ("name=7", "name", "7"),
        ("name=a=b --config.steps=3", "name", "a=b --config.steps=3"),
        ("name=two\nlines", "name", "two\nlines"),
        ("words=('c',)", "words", ("c",)),
        ("words=['c','d']", "words", ("c", "d")),
        ("words=()", "words", ()),
        ("sizes=(1,2)", "sizes", (1, 2)),
        ("peak=1e-3", "peak", 1e-3),
        ("peak=1", "peak", 1.0),
        ("peak=none", "peak", None),
    ],
)
def test_overrides_of_every_type(text: str, field: str, value: Any) -> None:
    found = getattr(build_with(text), field)
    assert (found, type(found)) == (value, type(value))


def test_overrides_reach_into_groups_and_the_last_one_wins() -> None:
    value = build_with("inner.rate=1", "inner.kind=hard", "table.one.rate=2.5", "steps=1", "steps=2")
    assert value.inner == Inner(rate=1.0, kind="hard")
    assert value.table["one"] == Inner(rate=2.5)
    assert value.steps == 2


finite = st.floats(allow_nan=False, allow_infinity=False)
scalars = {"steps": st.integers(), "exact": st.booleans(), "inner.rate": finite}
plain = {field: values.map(str) for field, values in scalars.items()}
tuples = {"words": st.lists(st.text()).map(tuple), "sizes": st.lists(st.integers()).map(tuple)}
written = plain | {field: values.map(repr) for field, values in tuples.items()} | {"name": st.text()}


@given(st.sampled_from(sorted(written)).flatmap(lambda field: st.tuples(st.just(field), written[field])))
def test_overrides_round_trip_through_text(pair: tuple[str, str]) -> None:
    field, text = pair
    value: Any = build_with(f"{field}={text}")
    for name in field.split("."):
        value = getattr(value, name)
    assert (value if field == "name" else str(value)) == text


@given(st.sampled_from(["steps", "exact", "inner.rate", "words", "peak", "name"]), st.text())
def test_any_text_is_a_valid_value_or_an_error_that_names_the_field(field: str, text: str) -> None:
    try:
        value = build_with(f"{field}={text}")
    except UserError as error:
        message = str(error)
    else:
        assert build(Outer, as_recipe(value)) == value
        return
    assert f"config.{field}=" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--config.stepps=3", "config.stepps is not a field: did you mean 'steps'?"),
        ("--config.inner.rat=3", "config.inner.rat is not a field: did you mean 'rate'? (valid: kind, rate)"),
        ("--config.table.two.rate=3", "config.table.two is not a field: valid: one"),
        ("--config.steps=many", "config.steps=many is str, expected int (like 3)"),
        ("--config.steps=1.5", "config.steps=1.5 is float, expected int (like 3)"),
        ("--config.steps=true", "config.steps=true is bool, expected int"),
        ("--config.exact=1", "config.exact=1 is int, expected bool"),
        ("--config.inner.rate=fast", "config.inner.rate=fast is str, expected float"),
        ("--config.words=a", "config.words=a is str, expected tuple (like ('a', 'b'))"),
        ("--config.inner=3", "config.inner is a group of fields (kind, rate); override one of them"),
        ("--config.steps.more=3", "config.steps is a value, not a group of fields, so config.steps.more does not"),
        ("--config.steps", "cannot read '--config.steps': write an override as --config.field=value"),
        ("--config.=3", "cannot read"),
        ("--config..steps=3", "config. is not a field"),
    ],
)
def test_invalid_overrides_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        override(recipe(), [text])
    assert message in str(caught.value)


def test_a_wrong_type_in_place_of_none_is_refused_when_the_config_is_built() -> None:
    with pytest.raises(UserError, match=r"config\.peak='high' is str, expected float"):
        build_with("peak=high")
    with pytest.raises(UserError, match=r"config\.steps=None is NoneType, expected int"):
        build_with("steps=none")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = 1", "lacks a function get_config() that returns the config"),
        ("def get_config(:", "fails with SyntaxError"),
        ("def get_config(): return 1 / 0", "fails with ZeroDivisionError: division by zero"),
        ("def get_config(): return {}['lost']", "fails with KeyError: 'lost'"),
        ("import nothing_of_that_name", "fails with ModuleNotFoundError"),
        (
            "def get_config(): return {'steps': 3}",
            "returned dict, expected a RunConfig or an ml_collections ConfigDict",
        ),
        ("def get_config(): pass", "returned NoneType, expected a RunConfig or an"),
    ],
)
def test_failing_recipes_are_refused_with_their_file(code: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(code)
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_recipe_may_raise_its_own_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe released:captoin: did you mean 'caption'"):
        load_recipe("released:captoin")
    (tmp_path / "mine.py").write_text("def get_config():\n    pass\n")
    with pytest.raises(UserError, match=r"mine\.py fails with TypeError: get_config\(\) takes 0 positional arguments"):
        load_recipe(f"{tmp_path}/mine.py:large")


def test_recipes_are_found_by_file_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "demo.py"
    mine.write_text("from ml_collections import ConfigDict\ndef get_config(arg=''): return ConfigDict({'arg': arg})\n")
    monkeypatch.chdir(tmp_path)
    shipped = recipe_folder() / "demo.py"
    assert [find_recipe(name) for name in ("demo", "configs/demo.py", "configs/demo")] == [shipped] * 3
    assert find_recipe(str(mine)) == mine
    assert find_recipe("demo.py") == Path("demo.py")
    assert load_recipe("demo.py").arg == ""
    assert load_recipe("demo.py:large", ["--config.arg=small"]).arg == "small"
