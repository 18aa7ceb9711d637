"""Renamed fields are read by both names, with one warning each."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import pytest
from absl import logging

from mplug2_jax import renames
from mplug2_jax.config import as_recipe, build, load_recipe, override, to_dict
from mplug2_jax.errors import UserError
from mplug2_jax.fields import config_groups
from mplug2_jax.recipes import api
from mplug2_jax.training.config import RunConfig, StreamConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    OLD_NAMES: ClassVar[Mapping[str, str]] = {"gentle": "mode"}
    OLD_VALUES: ClassVar[Mapping[str, Mapping[str, str]]] = {"mode": {"weak": "soft"}}
    mode: Literal["soft", "hard"] = "hard"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    OLD_NAMES: ClassVar[Mapping[str, str]] = {"turns": "steps", "piece": "group"}
    steps: int = 1
    group: Group = Group()
    groups: Mapping[str, Group] = dataclasses.field(default_factory=dict)


renames.accept_old_names(Whole)
renames.accept_old_names(Whole)  # a second call changes nothing
EXPECTED = Whole(steps=3, group=Group(mode="soft"), groups={"a": Group(mode="soft")})


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    lines: list[str] = []
    renames._warn_once.cache_clear()
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    yield lines
    renames._warn_once.cache_clear()


def test_recipes_may_import_classes_by_their_old_names() -> None:
    assert (api.TaskSettings, api.AdamWConfig) == (api.TasksConfig, api.OptimizerConfig)


def test_keys_of_a_mapping_are_renamed_too(warnings: list[str]) -> None:
    stream = build(RunConfig, load_recipe("demo")).streams["text"]
    values = to_dict(stream) | {"objectives": {"summarise": 1.0, "mlm": 0.5}}
    assert build(StreamConfig, values).objectives == {"summarize": 1.0, "mlm": 0.5}
    assert dataclasses.replace(stream, objectives={"summarise": 2.0}).objectives == {"summarize": 2.0}
    assert warnings == [
        "config.objectives.summarise is called config.objectives.summarize now; the old name is still read",
        "StreamConfig.objectives.summarise is called StreamConfig.objectives.summarize now; the old name is still read",
    ]


def test_a_config_file_is_read_by_old_names_and_values(warnings: list[str]) -> None:
    old = {"turns": 3, "piece": {"gentle": "weak"}, "groups": {"a": {"gentle": "soft"}}}
    assert build(Whole, old) == build(Whole, old) == EXPECTED
    assert warnings == [
        "config.turns is called config.steps now; the old name is still read",
        "config.piece is called config.group now; the old name is still read",
        "config.group.gentle is called config.group.mode now; the old name is still read",
        "config.group.mode=weak is called config.group.mode=soft now; the old name is still read",
        "config.groups.a.gentle is called config.groups.a.mode now; the old name is still read",
    ]


def test_a_file_of_an_older_version_is_read_silently(warnings: list[str]) -> None:
    with renames.without_warnings():
        assert build(Whole, {"turns": 3}) == Whole(steps=3)
    assert warnings == []
    build(Whole, {"turns": 3})
    assert len(warnings) == 1


def test_recipes_and_overrides_may_use_old_names(warnings: list[str]) -> None:
    old = Whole(turns=2, groups={"a": Group(gentle="soft")})  # type: ignore[call-arg]
    words = ["--config.turns=3", "--config.piece.gentle=weak"]
    assert build(Whole, override(as_recipe(old), words)) == EXPECTED
    assert dataclasses.replace(old, steps=4).steps == 4
    assert any("config.turns is called config.steps now" in line for line in warnings)


def test_both_names_at_once_and_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"config\.turns is the old name of config\.steps, and both are set: remove"):
        build(Whole, {"turns": 1, "steps": 2})
    with pytest.raises(UserError, match=r"config\.trns is not a field: did you mean 'turns'|config\.trns"):
        override(as_recipe(Whole()), ["--config.trns=2"])


def test_old_names_of_run_configs_map_to_fields() -> None:
    for group, path in config_groups(RunConfig).items():
        fields = {field.name for field in dataclasses.fields(group)}
        for old, new in getattr(group, "OLD_NAMES", {}).items():
            assert new in fields, f"{path}.{new}"
            assert old not in fields, f"{path}.{old}"
        assert set(getattr(group, "OLD_VALUES", {})) <= fields, path
