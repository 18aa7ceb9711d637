"""Durations: steps, epochs, examples and percent give steps, and a built run has steps alone."""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from data_pipelines.config import BatchStage, SourceConfig
from mplug2_jax.config import as_recipe, override, to_dict
from mplug2_jax.errors import UserError
from mplug2_jax.fields import STEPS, iter_fields
from mplug2_jax.objectives.config import DistillationConfig
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.training.config import StreamConfig
from mplug2_jax.training.durations import Durations, build_run_config
from tests.cli.conftest import mplug2
from tests.runs import small_run, text_run

STREAM = text_run().streams["text"]


def stream(batch_size: int, *records: int, **data: object) -> StreamConfig:
    sources = {f"source_{i}": SourceConfig(kind="text", max_records=count) for i, count in enumerate(records)}
    return StreamConfig(
        data=dataclasses.replace(STREAM.data, batch_size=batch_size, sources=sources, **data), objectives={"mlm": 1.0}
    )


TWO: Mapping[str, StreamConfig] = {"images": stream(8, 1000), "texts": stream(24, 100, 23)}


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("500", 500),
        ("500 steps", 500),
        ("1 step", 1),
        ("10k", 10_000),
        ("1.5k steps", 1500),
        ("1M examples", 31_250),
        ("33 examples", 2),
        ("1 example", 1),
        ("100 examples of images", 13),
        ("1 epoch of images", 125),
        ("1.5 epochs of texts", 8),  # 1.5 * 123 / 24 = 7.7
        ("5%", 50),
        ("0.01 %", 1),
        ("100%", 1000),
        ("0%", 0),
    ],
)
def test_a_duration_is_a_number_of_steps_rounded_up(text: str, steps: int) -> None:
    assert Durations(TWO, 1000).to_steps(text) == steps


def test_a_single_stream_need_not_be_named_and_drops_its_remainder() -> None:
    assert Durations({"one": stream(24, 100)}).to_steps("3 epochs") == 13
    assert Durations({"one": stream(24, 100, drop_remainder=True)}).to_steps("3 epochs") == 12


def test_a_ramp_of_the_batch_size_counts() -> None:
    ramp = (BatchStage(last_step=10, batch_size=4), BatchStage(last_step=20, batch_size=8))
    one = {"one": stream(24, 100, batch_ramp=ramp)}  # 40 examples in 10 steps, 120 in 20
    for text, steps in (("40 examples", 10), ("41 examples", 11), ("120 examples", 20), ("1 epoch", 18)):
        assert Durations(one).to_steps(text) == steps
    both = Durations(one | {"two": stream(6, 100)})
    assert (both.to_steps("100 examples"), both.to_steps("101 examples"), both.to_steps("1 epoch of one")) == (
        10,
        11,
        18,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5 %%", "config.x='5 %%' is not a duration: expected 500, '10k steps', '3 epochs'"),
        ("3 parsecs", "config.x='3 parsecs' is not a duration"),
        ("-3 epochs", "config.x='-3 epochs' is not a duration"),
        ("5% of images", "is not a duration"),
        ("5 steps of images", "is not a duration"),
        ("", "is not a duration"),
        ("true", "is not a duration"),
        ("2 epochs", "config.x='2 epochs' names no stream, and each has its own epochs: add ' of images'"),
        ("2 epochs of image", "names a stream that the run lacks: did you mean 'images'? (valid: images, texts)"),
        ("9 examples of pictures", "names a stream that the run lacks: valid: images, texts"),
        ("101%", "config.x='101%' is longer than the run: expected at most 100%"),
    ],
)
def test_what_is_no_duration_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Durations(TWO, 1000).to_steps(text, "config.x")
    assert message in str(caught.value)


def test_epochs_of_data_that_are_elsewhere_are_refused() -> None:
    away = SourceConfig(format="array_record", kind="text", path="/nowhere/*.array_record")
    data = dataclasses.replace(STREAM.data, sources={"shards": away})
    durations = Durations({"text": dataclasses.replace(STREAM, data=data)})
    assert durations.to_steps("80 examples") == 10
    with pytest.raises(UserError, match=r"records of config.streams.text cannot be counted here \(.*nowhere.*\); give"):
        durations.to_steps("3 epochs", "config.steps")


counts = st.integers(0, 10**6)
sizes = st.integers(1, 4096)


@given(counts, sizes)
def test_steps_and_their_examples_are_the_same_duration(steps: int, batch_size: int) -> None:
    durations = Durations({"one": stream(batch_size, 1)})
    assert durations.to_steps(f"{steps} steps") == steps
    assert durations.to_steps(f"{steps * batch_size} examples") == steps


@given(st.integers(0, 10**4), st.integers(1, 10**4), sizes)
def test_epochs_are_their_examples(epochs: int, records: int, batch_size: int) -> None:
    durations = Durations({"one": stream(batch_size, records)})
    expected = durations.to_steps(f"{epochs * records} examples")
    assert durations.to_steps(f"{epochs} epochs") == expected == math.ceil(Fraction(epochs * records, batch_size))


@given(st.integers(1, 10**6), st.decimals(0, 100, places=3), st.decimals(0, 100, places=3))
def test_percentages_are_monotone_and_cover_the_run(steps: int, first: object, second: object) -> None:
    durations = Durations(TWO, steps)
    small, large = sorted((first, second))  # type: ignore[type-var]
    assert durations.to_steps(f"{small}%") <= durations.to_steps(f"{large}%") <= durations.to_steps("100%") == steps
    assert bool(durations.to_steps(f"{small}%")) == bool(small)  # rounded up: at least 1


@given(st.text())
def test_any_text_is_a_duration_or_an_error_that_names_the_field(text: str) -> None:
    try:
        steps = Durations(TWO, 10).to_steps(text, "config.x")
    except UserError as error:
        message = str(error)
    else:
        assert steps >= 0
        return
    assert message.startswith("config.x=")


def recipe(*overrides: str) -> ConfigDict:
    run = small_run(steps=200, tasks=TasksConfig(distillation=DistillationConfig()))
    return override(as_recipe(run), [f"--config.{text}" for text in overrides])


def test_every_field_of_steps_takes_a_duration(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("absl").setLevel(logging.INFO)
    fields = [
        field.path for field in iter_fields(build_run_config(recipe())) if field.type == STEPS and field.path != "steps"
    ]
    assert {"eval_every", "tasks.distillation.ramp_steps", "checkpoint.keep_every_steps"} < set(fields)
    fields.remove("schedule.decay_steps")  # not read by this kind
    overrides = ["steps=3000 examples", *(f"{path}=10%" for path in fields), 'profile.start_steps=("20%",7)']
    run = build_run_config(recipe(*overrides))
    values = {field.path: field.value for field in iter_fields(run)}
    assert run.steps == 125
    assert {path: values[path] for path in fields} == dict.fromkeys(fields, 13)
    assert run.profile.start_steps == (25, 7)
    assert "config.schedule.warmup_steps = 10% = 13 steps" in caplog.text
    assert "%" not in json.dumps(to_dict(run))


def test_stages_of_a_stream_take_durations() -> None:
    """A ramp counts the examples of its own stream, stage by stage; other fields count with the ramp."""
    ramp = [{"last_step": "80 examples", "batch_size": 8}, {"last_step": "0.1k examples", "batch_size": 16}]
    stages = [{"start_step": "200 examples of text", "weights": {}}, {"start_step": "50%", "weights": {}}]
    data = "streams.text.data"
    run = build_run_config(
        recipe(f"{data}.batch_ramp={ramp}", f"{data}.mixture_stages={stages}", f"{data}.batch_size=32")
    )
    text = run.streams["text"].data
    assert [stage.last_step for stage in text.batch_ramp] == [10, 12]  # 80 examples in 10 steps, 112 in 12
    assert [stage.start_step for stage in text.mixture_stages] == [15, 100]  # 208 examples in 15 steps

    of_steps = build_run_config(recipe(f"{data}.batch_ramp=[{{'last_step':'10%','batch_size':8}}]", "steps=30 steps"))
    assert of_steps.streams["text"].data.batch_ramp[0].last_step == 3
    with pytest.raises(UserError, match=r"percentages are of config\.steps='3k examples', which depends"):
        build_run_config(recipe(f"{data}.batch_ramp=[{{'last_step':'10%','batch_size':8}}]", "steps=3k examples"))


def test_the_last_override_wins_whichever_way_it_is_written() -> None:
    assert build_run_config(recipe("log_every=5%", "log_every=7")).log_every == 7
    assert build_run_config(recipe("log_every=7", "log_every=5%")).log_every == 10


def test_durations_are_read_by_the_old_names_of_fields() -> None:
    old = ConfigDict(to_dict(small_run(steps=200)) | {"evaluate_every": "5%"}, type_safe=False)
    del old["eval_every"]
    assert build_run_config(old).eval_every == 10


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "steps=5%",
            "config.steps='5%': percentages are of config.steps, which needs steps, epochs or examples itself",
        ),
        ("log_every=0%", "config.log_every=0 must be at least 1"),
        (
            "streams.text.data.batch_ramp=[{'last_step':'5 parsecs','batch_size':8}]",
            "config.streams.text.data.batch_ramp[0].last_step='5 parsecs' is not a duration",
        ),
        (
            "streams.text.data.batch_ramp=[{'last_step':'9%','batch_size':8},{'last_step':'5%','batch_size':8}]",
            "config.streams.text.data: batch_ramp[1].last_step=10 must be above 18, and rise by stage",
        ),
        ("seed=5%", "config.seed='5%' is str, expected int"),
        ("log_every=soon", "config.log_every=soon is str, expected int"),
        ("log_every=3 epochs", "config.log_every='3 epochs' names no stream"),
    ],
)
def test_a_run_with_an_invalid_duration_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_run_config(recipe(override))
    assert message in str(caught.value)


def test_the_command_prints_steps() -> None:
    shown = mplug2(
        "config", "demo", "--only", "warmup", "--config.steps=2 epochs of text", "--config.schedule.warmup_steps=5%"
    )
    assert shown.out.startswith("--config.schedule.warmup_steps=625 ")
