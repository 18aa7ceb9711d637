"""Config changes at a resume: the kinds of fields, --force-change, and the config of earlier steps."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.tokenizers import train_wordpiece
from mplug2_jax.config import as_recipe, build, override
from mplug2_jax.errors import UserError
from mplug2_jax.fields import iter_fields
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.training.config import OptimizerConfig, RunConfig, ScheduleConfig, TokenizerConfig
from mplug2_jax.training.config_changes import changed_since, config_at, configs_between, find_changes
from mplug2_jax.training.telemetry.events import EventLog, read_events
from mplug2_jax.training.workdir import WorkDir, check_tokenizer_unchanged
from tests.runs import small_run, text_run

BASE = text_run(steps=9, optimizer=OptimizerConfig(learning_rate=1e-3))
OTHER_RATE = OptimizerConfig(learning_rate=1e-4)


def with_source(**fields: Any) -> RunConfig:
    stream = BASE.streams["text"]
    sources = {name: dataclasses.replace(source, **fields) for name, source in stream.data.sources.items()}
    data = dataclasses.replace(stream.data, sources=sources)
    return dataclasses.replace(BASE, streams={"text": dataclasses.replace(stream, data=data)})


def with_stage(**weights: float) -> RunConfig:
    """Return the run with other weights from step 4 on, set as on the command line."""
    stages = [{"start_step": 4, "weights": weights}]
    recipe = override(as_recipe(BASE), [f"--config.streams.text.data.mixture_stages={stages}"])
    return build(RunConfig, recipe)


def resume(workdir: WorkDir, config: RunConfig, step: int, *force: str) -> RunConfig:
    """Do what a run does that resumes after a step."""
    assert workdir.check_config(config, force)
    events = EventLog(workdir.events)
    workdir.change_config(config, None, find_changes(workdir.read_config(), config, force), step, events)
    events.log_event("resumed", step)
    events.close()
    return workdir.read_config()


@pytest.fixture
def workdir(tmp_path: Path) -> WorkDir:
    workdir = WorkDir(tmp_path / "run")
    workdir.initialize(BASE, None)
    return workdir


def test_every_field_has_the_kind_written_beside_it() -> None:
    kinds = {field.path: field.kind for field in iter_fields(small_run())}
    for kind, names in {
        "runtime": "log_every checkpoint.keep_last faults.max_consecutive_skips streams.text.data.num_workers "
        "streams.text.data.sources.digits.path evaluations.questions.data.batch_size compilation_cache",
        "execution": "mesh.fsdp model.remat.text model.attention fsdp_gather grad_accum_steps "
        "optimizer.offload_moments",
        "training": "steps seed model.width model.dtype optimizer.learning_rate streams.text.objectives.mlm "
        "streams.text.data.batch_size streams.text.data.sources.digits.weight schedule.kind",
    }.items():
        assert {name: kinds[name] for name in names.split()} == dict.fromkeys(names.split(), kind)


def test_micro_batches_decide_where_a_loss_compares_their_examples_or_the_schedule_counts_them() -> None:
    released = text_run(schedule=ScheduleConfig(kind="released"))
    pairs = dataclasses.replace(small_run().streams["image_text"], objectives={"vlc": 1.0})
    for base, kind in ((BASE, "execution"), (small_run(streams={"pairs": pairs}), "training"), (released, "training")):
        (change,) = find_changes(base, dataclasses.replace(base, grad_accum_steps=2))
        assert change.kind == kind


RATE = "config.optimizer.learning_rate"
REFUSED: dict[str, tuple[RunConfig, list[str], str]] = {
    "without the option": (
        text_run(steps=9, optimizer=OTHER_RATE), [],
        r"another config: optimizer\.learning_rate was 0\.001 and is 0\.0001\. Use the same config .* or change the "
        r"config from the last checkpoint on by --force-change config\.optimizer\.learning_rate$",
    ),
    "an unknown field": (BASE, ["config.optimizer.lerning_rate"], f"is not a field: did you mean '{RATE}'"),
    "no config.": (BASE, ["optimizer.learning_rate"], f"is not a field: did you mean '{RATE}'"),
    "unchanged": (BASE, [RATE], f"--force-change {RATE} changes nothing: set it to another value than the run's, or"),
    "another field": (text_run(steps=9, seed=1, optimizer=OTHER_RATE), [RATE], "another config: seed was 0 and is 1"),
    "fewer steps": (dataclasses.replace(BASE, steps=8), [], "steps was 9 and is 8"),
    "another source": (with_source(split="heldout"), [], r"digits\.split was '' and is 'heldout'"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "force", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_may_not_change_is_refused(config: RunConfig, force: list[str], sentence: str, workdir: WorkDir) -> None:
    with pytest.raises(UserError, match=sentence):
        workdir.check_config(config, force)


def test_a_new_run_has_nothing_to_force(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run to resume; remove the option"):
        WorkDir(tmp_path / "new").check_config(BASE, [RATE])


@pytest.mark.parametrize(
    ("config", "force"),
    [
        (dataclasses.replace(BASE, steps=10, log_every=3, grad_accum_steps=2, mesh=MeshConfig(data=2)), []),
        (with_source(path="/moved"), []),
        (dataclasses.replace(BASE, steps=8, optimizer=OTHER_RATE), ["config.steps", "config.optimizer"]),
        (with_source(weight=2.0), ["config.streams.text.data.sources.digits.weight"]),
        (with_stage(digits=2), ["config.streams.text.data.mixture_stages"]),
    ],
)
def test_what_may_change_is_written_to_the_config_and_the_events(
    config: RunConfig, force: list[str], workdir: WorkDir
) -> None:
    assert resume(workdir, config, 3, *force) == config
    lines = [line for line in read_events(workdir.events) if line["event"] == "config_changed"]
    assert [(line["step"], line["field"], line["new"]) for line in lines] == [
        (3, change.field, change.values["new"]) for change in find_changes(BASE, config)
    ]
    assert {line["forced"] for line in lines} == {bool(force)}
    if force:  # earlier steps keep what decides
        assert config_at(3, config, read_events(workdir.events)) == BASE
    assert workdir.check_config(config, force)  # the same command again, after a preemption


def test_a_config_must_keep_the_runs_tokenizer(tmp_path: Path) -> None:
    tokenizer, other = (train_wordpiece(texts, 60) for texts in (["one two"], ["red blue"]))
    moved, changed = (
        dataclasses.replace(BASE, tokenizer=TokenizerConfig(path=str(each.save(tmp_path / name))))
        for each, name in ((tokenizer, "moved"), (other, "other"))
    )
    check_tokenizer_unchanged(moved, tokenizer, find_changes(BASE, moved))
    with pytest.raises(UserError, match=r"tokenizer\.path was '' and is '.*' names another tokenizer than the one"):
        check_tokenizer_unchanged(changed, tokenizer, find_changes(BASE, changed))


def test_every_step_has_the_config_of_its_last_time(workdir: WorkDir) -> None:
    """Step 6 and later ones were done with a first change, and again, from an older checkpoint, with a second."""
    longer = resume(workdir, dataclasses.replace(BASE, steps=12, log_every=3), 5)
    warmer = dataclasses.replace(
        longer, schedule=ScheduleConfig(kind="constant", warmup_steps=2), mesh=MeshConfig(data=2)
    )
    config = resume(workdir, warmer, 7, "config.schedule")
    config, events = resume(workdir, config, 3), read_events(workdir.events)
    assert config_at(4, config, events) is config
    # Where files are, and on which devices a run computes, is known for now alone.
    assert config_at(3, config, events) == dataclasses.replace(config, steps=9, schedule=BASE.schedule)
    before, after = configs_between(2, 11, config, events)
    assert (before[0], after) == (range(2, 4), (range(4, 12), config))
    assert changed_since(events, 6) == {"schedule.warmup_steps", "mesh.data"}


def test_steps_that_an_older_version_extended_are_known() -> None:
    events = [{"event": "resumed", "step": 4}, {"event": "steps_extended", "step": 4, "old_steps": 6}]
    assert [config_at(step, BASE, events).steps for step in (4, 5)] == [6, 9]


def test_fields_of_groups_that_come_and_go_are_restored(workdir: WorkDir) -> None:
    stream = BASE.streams["text"]
    both = dataclasses.replace(BASE, streams={"text": stream, "more": stream})
    assert resume(workdir, both, 3, "config.streams.more") == both
    assert resume(workdir, BASE, 6, "config.streams.more") == BASE
    events = read_events(workdir.events)
    assert [config_at(step, BASE, events) for step in (3, 4, 6, 7)] == [BASE, both, both, BASE]
