"""The loop in one process: what a run logs and writes, old runs, and runs that are refused."""

import dataclasses
import json
import logging
import multiprocessing
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.config import BatchStage, DataConfig, ExampleConfig, SourceConfig
from data_pipelines.errors import DataError
from mplug2_jax.cli.main import main
from mplug2_jax.errors import UserError
from mplug2_jax.inference.replay import replay_step
from mplug2_jax.launch.local import find_free_port
from mplug2_jax.model.config import RematConfig
from mplug2_jax.objectives.config import VlmConfig
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.training import loop
from mplug2_jax.training.config import OptimizerConfig, RunConfig, ScheduleConfig, StreamConfig
from mplug2_jax.training.loop import train
from mplug2_jax.training.reliability.lock import WorkDirLock
from mplug2_jax.training.reliability.watchdog import PhaseKind, Watchdog
from mplug2_jax.training.step import TrainStep, make_train_step
from mplug2_jax.training.telemetry.events import read_events
from mplug2_jax.training.telemetry.goodput import read_goodput
from mplug2_jax.training.telemetry.metric_log import read_step_lines, read_train_metrics
from mplug2_jax.training.telemetry.monitor import TrainMonitor
from mplug2_jax.training.workdir import WorkDir
from tests.close import assert_close
from tests.data_pipelines.worlds import write_tar
from tests.runs import QUESTION, recipe_file, small_model, small_run, stream, text_run
from tests.scrape import scrape

TEXT = {"text": small_run().streams["text"]}  # the cheapest to compile


def with_a_broken_record(folder: Path, max_bad_fraction: float = 0.5) -> StreamConfig:
    """Return a stream of DigitWorld's sentences and as many of a tar with eight records, one of which is no text."""
    sentences = {f"{i:02}.txt": b"\xff" if i == 3 else f"a red {i} moves left" for i in range(8)}
    tar = SourceConfig(format="webdataset", path=str(write_tar(folder / "a.tar", sentences)), kind="text")
    sources = {"digits": SourceConfig(kind="text"), "tars": tar}
    examples = ExampleConfig(text="sentence", text_length=12)
    data = DataConfig(sources=sources, examples=examples, batch_size=8, max_bad_fraction=max_bad_fraction)
    return StreamConfig(data=data, objectives={"mlm": 1.0})


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, PhaseKind]]:
    """Return the list that receives the phases of the watchdog."""
    entered: list[tuple[str, PhaseKind]] = []
    monkeypatch.setattr(Watchdog, "enter", lambda self, phase, kind="other": entered.append((phase, kind)))
    return entered


def test_a_run_logs_and_writes_what_happens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    phases: list[tuple[str, PhaseKind]],
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, logger="absl")
    served: list[dict[tuple[str, ...], float]] = []
    close = TrainMonitor.close
    monkeypatch.setattr(TrainMonitor, "close", lambda self: (served.append(scrape(port)[1]), close(self))[1])
    port = find_free_port()
    config = small_run(
        streams={"text": with_a_broken_record(tmp_path)}, evaluations={}, mesh=MeshConfig(fsdp=8), metrics_port=port
    )  # fmt: skip
    assert train(config, tmp_path / "run") == []
    assert "parameters in text, universal, mlm" in caplog.text
    assert "mesh fsdp=8 on cpu" in caplog.text
    progress = [message for message in caplog.messages if re.match(r"step \d/4  loss \d+\.\d{4}  ", message)]
    assert len(progress) == 4
    assert re.search(r"examples/s  data wait \d+\.\d%  [\d.]+ GFLOP/s  [\d.]+ steps/s  eta 0:00$", progress[-1])
    lines = read_train_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "text/mlm/accuracy", "gradient_norm", "learning_rate/rest", "examples_per_second", "data_wait",
            "flops_per_second"} <= set(lines[0])  # fmt: skip
    assert lines[0]["flops_per_second"] > 0
    saved_steps = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdecimal())
    assert saved_steps == [2, 4]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["name"] == "small"
    assert [phase for phase, _ in phases[:3]] == [
        "taking the lock of the work directory", "setting up the run", "initializing or restoring the state"
    ]  # fmt: skip
    assert phases[3:] == [
        ("waiting for the batches of step 1", "other"), ("compiling, and step 1", "compile"),
        ("the first step", "compile"),
        ("waiting for the batches of step 2", "other"), ("step 2", "step"), ("saving step 2", "other"),
        ("waiting for the batches of step 3", "other"), ("step 3", "step"),
        ("waiting for the batches of step 4", "other"), ("step 4", "step"), ("saving step 4", "other"),
        ("ending the run", "other"),
    ]  # fmt: skip
    hosts = read_step_lines(tmp_path / "run" / "hosts.jsonl")
    assert [line["step"] for line in hosts] == [1, 2, 3, 4]
    assert all(0 <= line["shares"][cause][0] <= 1 for line in hosts for cause in ("data", "step", "memory"))
    # Of every batch half comes from the tar, whose epoch is two batches.
    assert sum(line.get("data/skipped/tars", 0) for line in lines) == 2
    (values,) = served
    assert (values["mplug2_step",], values["mplug2_examples_total",]) == (4, 32)
    assert values["mplug2_skipped_records_total", "tars"] == 2
    assert (values["mplug2_loss",], values["mplug2_objective_loss", "mlm", "text"]) == (
        lines[-1]["loss"], lines[-1]["text/mlm/loss"]
    )  # fmt: skip
    assert (values["mplug2_checkpoint_step",], values["mplug2_events_total", "saved"]) == (4, 2)
    spans = read_goodput(tmp_path / "run" / "goodput.jsonl")
    compiling = sum(span["seconds"].get("compile", 0.0) for span in spans)
    assert values["mplug2_phase_seconds_total", "compile"] == pytest.approx(compiling, abs=1e-4)
    assert 0 < values["mplug2_goodput_ratio",] < 1
    assert sum(value for name, value in lines[-1].items() if name.startswith("goodput/")) == pytest.approx(1)
    (line,) = (tmp_path / "run" / "data-errors.jsonl").read_text().splitlines()
    assert (
        json.loads(line)["reason"] == ".txt of sample a/03 is not UTF-8 text: invalid start byte in line 1; convert it"
    )


def test_a_ramp_of_the_batch_size_compiles_each_stage_and_resumes_inside_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
    phases: list[tuple[str, PhaseKind]],
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, logger="absl")
    config = text_run(
        batch_size=16, batch_ramp=(BatchStage(last_step=3, batch_size=8),), steps=5, log_example_ids=True,
        schedule=ScheduleConfig(kind="constant", warmup_steps=1),
    )  # fmt: skip
    shared: dict[str, TrainStep] = {}  # so that the programs are compiled once for all runs
    monkeypatch.setattr(loop, "make_train_step", lambda spec: shared.setdefault("step", make_train_step(spec)))
    through, resumed = (WorkDir(tmp_path / name) for name in ("through", "resumed"))
    train(config, through.path)
    compiled = [line for line in read_events(through.events) if line["event"] == "compiled"]
    assert [(line["step"], line["batch_sizes"]) for line in compiled] == [(1, {"text": 8}), (4, {"text": 16})]
    assert "step 4: compiling the train step for batches of text 16 examples" in caplog.text
    compiling = [phase for phase, kind in phases if kind == "compile" and phase != "the first step"]
    assert compiling == ["compiling, and step 1", "compiling, and step 4"]
    lines = read_train_metrics(through.metrics)
    rates = ("examples_per_second", "tokens_per_second_per_device", "flops_per_second")
    examples, tokens, flops = (np.array([line[name] * line["seconds_per_step"] for line in lines]) for name in rates)
    sizes = np.array([8, 8, 8, 16, 16])
    assert_close(examples, sizes, 1e-6)
    assert_close(tokens, sizes * tokens[0] / 8, 1e-6)
    assert_close(flops, sizes * flops[0] / 8, 0.1)

    train(dataclasses.replace(config, steps=2), resumed.path)
    train(config, resumed.path)
    assert resumed.examples.read_bytes() == through.examples.read_bytes()
    losses, expected = ([line["loss"] for line in read_train_metrics(each.metrics)] for each in (resumed, through))
    assert losses == expected


def test_every_size_of_a_ramp_must_divide() -> None:
    ramp = (BatchStage(last_step=3, batch_size=6),)
    with pytest.raises(
        UserError, match=r"data\.batch_ramp\[0\]\.batch_size=6 is not a multiple of config\.grad_accum_s"
    ):
        text_run(batch_size=16, batch_ramp=ramp, grad_accum_steps=4)
    images = small_run().streams["image_text"]
    streams = {"image_text": dataclasses.replace(images, data=dataclasses.replace(images.data, batch_ramp=ramp))}
    with pytest.raises(
        UserError, match=r"image_text: 6 examples per micro-batch are not a multiple of config\.tasks\.vlm"
    ):
        small_run(streams=streams, tasks=TasksConfig(vlm=VlmConfig(group_size=4)))


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with WorkDirLock(WorkDir(tmp_path / "run").lock), pytest.raises(UserError, match="is in use by process"):
        train(small_run(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_an_older_version_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the ``config.json`` of :func:`small_run` as the version before ``format_version`` wrote it."""
    workdir = WorkDir(tmp_path)
    shutil.copyfile(Path(__file__).with_name("config_format_1.json"), tmp_path / "config.json")
    run = small_run(schedule=ScheduleConfig(warmup_steps=1))
    assert workdir.read_config() == run
    assert workdir.check_config(dataclasses.replace(run, steps=9))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        workdir.check_config(dataclasses.replace(run, seed=1))
    workdir.initialize(small_run(), None)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["format_version"] == 2
    assert "grad_accum_steps" in values
    assert "accumulate" not in values
    assert workdir.read_config() == small_run()
    (tmp_path / "config.json").write_text(json.dumps(values | {"format_version": 3}))
    with pytest.raises(UserError, match="has format_version 3, but this version reads up to 2; update mplug2_jax"):
        workdir.read_config()


def test_steps_may_grow_and_not_shrink(tmp_path: Path) -> None:
    workdir = WorkDir(tmp_path)
    workdir.initialize(small_run(steps=4), None)
    assert workdir.check_config(small_run(steps=9))
    with pytest.raises(UserError, match="steps was 4 and is 3"):
        workdir.check_config(small_run(steps=3))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("file", "is a file; choose a new folder"),
        ("full", "is not empty and holds no run"),
        ("gs://bucket/run", "is a URL that was taken for a local path"),
    ],
)
def test_a_folder_that_cannot_hold_a_run_is_untouched(
    name: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("full").mkdir()
    Path("full", "notes").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=sentence):
        train(small_run(), Path(name))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_refused_config_leaves_no_trace(tmp_path: Path) -> None:
    config = dataclasses.replace(small_run(), mesh=MeshConfig(data=3))
    with pytest.raises(UserError, match="does not divide the 8 devices"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_too_many_broken_records_stop_the_run(tmp_path: Path) -> None:
    config = small_run(streams={"text": with_a_broken_record(tmp_path, 0.0)}, evaluations={}, mesh=MeshConfig(fsdp=8))
    with pytest.raises(
        DataError, match=r"source 'tars' cannot be used, more than max_bad_fraction=0 allows \(record 3: "
    ):
        train(config, tmp_path / "run")


@pytest.mark.slow
def test_worker_processes_change_nothing_of_a_run_and_may_change_when_it_resumes(tmp_path: Path) -> None:
    stream = with_a_broken_record(tmp_path)

    def run(steps: int, workers: int) -> RunConfig:
        data = dataclasses.replace(stream.data, num_workers=workers, prefetch=16 + workers)
        streams = {"text": dataclasses.replace(stream, data=data)}
        return small_run(streams=streams, evaluations={}, steps=steps, log_example_ids=True)

    train(run(4, 0), tmp_path / "threads")
    train(run(2, 1), tmp_path / "workers")
    train(run(4, 2), tmp_path / "workers")
    threads, workers = (WorkDir(tmp_path / name) for name in ("threads", "workers"))
    assert workers.examples.read_bytes() == threads.examples.read_bytes()
    assert workers.data_errors_path(0).read_bytes() == threads.data_errors_path(0).read_bytes()
    losses, expected = ([line["loss"] for line in read_train_metrics(each.metrics)] for each in (workers, threads))
    assert losses == expected


@pytest.mark.slow
def test_a_run_resumes_with_other_settings_and_replay_knows_them(tmp_path: Path) -> None:
    examples = ExampleConfig(instructions=QUESTION, instruction_length=12, target_length=6)
    answers = {"q": stream("image", 16, examples, answer=1.0)}  # its loss is a plain mean over questions
    config = small_run(
        model=small_model(dropout=0.0), streams=answers, evaluations={}, log_example_ids=True,
        schedule=ScheduleConfig(kind="constant", warmup_steps=1),
    )  # fmt: skip
    through, changed = (WorkDir(tmp_path / name) for name in ("through", "changed"))
    train(config, through.path)
    train(dataclasses.replace(config, steps=2), changed.path)
    remat = dataclasses.replace(config.model, remat=RematConfig(decoder="full"))
    micro = dataclasses.replace(config, grad_accum_steps=2, model=remat)
    train(micro, changed.path)
    assert changed.examples.read_bytes() == through.examples.read_bytes()
    losses, expected = ([line["loss"] for line in read_train_metrics(each.metrics)] for each in (changed, through))
    assert_close(losses, expected, 1e-5)
    wider = dataclasses.replace(micro, model=small_model(width=64))
    before = changed.path.joinpath("config.json").read_bytes()
    with pytest.raises(UserError, match="is of another size"):
        train(wider, changed.path, ["config.model"])
    assert changed.path.joinpath("config.json").read_bytes() == before
    slower = dataclasses.replace(micro, steps=6, optimizer=OptimizerConfig(learning_rate=1e-4))
    train(slower, changed.path, ["config.optimizer.learning_rate"])
    for saved in (2, 4):  # so that the replay begins with step 1 and passes both changes
        shutil.rmtree(changed.checkpoints / str(saved), ignore_errors=True)
    replayed = replay_step(changed, 5, num_ranked=1)
    assert (replayed.start_step, replayed.differences, replayed.changes) == (0, {}, [])


@pytest.mark.slow
def test_a_killed_data_worker_ends_a_run_that_launchers_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TEXT["text"]
    config = small_run(
        streams={"text": dataclasses.replace(text, data=dataclasses.replace(text.data, num_workers=1, prefetch=1))},
        evaluations={}, steps=1000,
    )  # fmt: skip
    original = TrainMonitor.on_step_dispatched

    def kill_worker(self: TrainMonitor, number: int, *args: Any) -> None:
        if number == 3:
            for process in multiprocessing.active_children():
                process.kill()
        original(self, number, *args)

    monkeypatch.setattr(TrainMonitor, "on_step_dispatched", kill_worker)
    assert (
        main(["train", "--config", str(recipe_file(config, tmp_path / "r.py")), "--workdir", str(tmp_path / "run")])
        == 69
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        "mplug2: error: a data worker was killed by SIGKILL, as the kernel does when memory runs out"
    )
    assert any(path.name.isdecimal() for path in (tmp_path / "run" / "checkpoints").iterdir())
