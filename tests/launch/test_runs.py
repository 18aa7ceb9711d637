"""Runs of several real processes equal a run of one process, and report differences between processes."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.launch.local import find_free_port, process_environment
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.training.config import CheckpointConfig
from mplug2_jax.training.telemetry.events import read_events
from mplug2_jax.training.telemetry.metric_log import read_train_metrics
from tests.close import assert_close
from tests.data_pipelines.worlds import write_tar
from tests.launch.processes import environment
from tests.runs import ENTAILMENT, recipe_file, small_model, small_run, stream, text_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MESH = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a recipe of masked language modeling, with a partial last batch and two undecodable held-out texts."""
    folder = tmp_path_factory.mktemp("runs")
    sentences = {f"{i:02}.txt": b"\xff" if i in (2, 7) else f"a red {i} moves left" for i in range(10)}
    sources = {
        "digits": SourceConfig(kind="text", split="heldout", max_records=11),
        "tars": SourceConfig(format="webdataset", path=str(write_tar(folder / "a.tar", sentences)), kind="text"),
    }
    examples = ExampleConfig(text="sentence", text_length=12)
    heldout = DataConfig(sources=sources, examples=examples, batch_size=8, max_bad_fraction=0.5)
    evaluations = {"words": EvaluationConfig(task="mlm", data=heldout, num_samples=12)}
    recipe_file(text_run(evaluations=evaluations, log_example_ids=True), folder / "recipe.py")
    return folder


def mplug2(folder: Path, *words: str, devices: int = 8) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "mplug2_jax.cli.main", *words],
        env=environment(folder, devices), capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def train(folder: Path, workdir: str, *launched: str) -> Path:
    recipe = str(folder / "recipe.py")
    done = mplug2(folder, *launched, "train", "--config", recipe, "--workdir", str(folder / workdir), *MESH)
    assert done.returncode == 0, done.stderr
    return folder / workdir


def evaluation(workdir: Path) -> dict[str, Any]:
    (path,) = workdir.glob("evaluations/*/words.json")
    return {name: value for name, value in json.loads(path.read_text()).items() if name != "seconds"}


@pytest.fixture(scope="module")
def single(folder: Path) -> Path:
    """Train in one process with eight devices; return the work directory."""
    return train(folder, "single")


@pytest.mark.parametrize("processes", [4])
def test_several_processes_train_and_evaluate_like_one(folder: Path, single: Path, processes: int) -> None:
    launched = ("launch", "local", "--processes", str(processes), "--devices-per-process", str(8 // processes), "--")
    workdir = train(folder, f"by-{processes}", *launched)
    assert (workdir / "examples.jsonl").read_bytes() == (single / "examples.jsonl").read_bytes()
    metrics, expected = (read_train_metrics(folder / "metrics.jsonl") for folder in (workdir, single))
    assert [line["step"] for line in metrics] == [line["step"] for line in expected] == [1, 2, 3, 4]
    assert_close([line["loss"] for line in metrics], [line["loss"] for line in expected])
    assert evaluation(workdir) == evaluation(single)
    assert evaluation(workdir)["num_examples"] == 11 + 10 - 2
    assert len(evaluation(workdir)["skipped"]) == 2
    assert {path.name for path in workdir.iterdir()} == {path.name for path in single.iterdir()}

    (path,) = workdir.glob("evaluations/*/words.json")
    path.unlink()
    repeated = mplug2(folder, *launched, "eval", "--workdir", str(workdir), *MESH)
    assert repeated.returncode == 0, repeated.stderr
    assert evaluation(workdir) == evaluation(single)
    assert repeated.stderr.count(" examples, ") == 1  # only process 0 logs


def test_different_commands_are_reported(folder: Path) -> None:
    address = f"127.0.0.1:{find_free_port()}"
    recipe = str(folder / "recipe.py")
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "mplug2_jax.cli.main", "train", "--config", recipe, "--workdir", str(folder / "two"),
             f"--config.seed={index}"],
            env=environment(folder, 8) | process_environment(index, 2, 1, address), stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert 2 in [process.returncode for process in running]
    message = "mplug2: error: process 1 has config.seed=1, process 0 has 0; start all processes with the same command"
    assert any(message in text for text in errors)
    assert not (folder / "two").exists()


SLOW = """
import os, sys, time
import mplug2_jax.training.loop as loop
from mplug2_jax.cli.main import main
from mplug2_jax.training.telemetry.profiling import Profiler

process, batches, before_step = int(os.environ["JAX_PROCESS_ID"]), loop.device_batches, Profiler.before_step

def slow_batches(*args):
    for number, batch in enumerate(batches(*args)):
        time.sleep(1.5 * (process == 1 and 1 <= number < 8))
        yield batch

def slow_step(self, step):
    time.sleep(1.5 * (process == 2 and step >= 11))
    before_step(self, step)

loop.device_batches, Profiler.before_step = slow_batches, slow_step
sys.exit(main(sys.argv[1:]))
"""


def test_a_slow_loader_and_a_slow_step_are_named_with_their_process(tmp_path: Path) -> None:
    run = text_run(steps=16, log_every=2, checkpoint=CheckpointConfig(every_steps=100))
    recipe, address = recipe_file(run, tmp_path / "recipe.py"), f"127.0.0.1:{find_free_port()}"
    words = ["train", "--config", str(recipe), "--workdir", str(tmp_path / "run")]
    words += ["--config.mesh.fsdp=1", "--config.mesh.data=4"]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW, *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            env=environment(tmp_path, 1) | process_environment(index, 4, 1, address),
        )
        for index in range(4)
    ]  # fmt: skip
    logs = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0] * 4, logs
    named = re.findall(r"slowest: process (\d) \(\S+\) (waits for data|works on the host) for", logs[0])
    # On a busy machine others may be named as well, in steps of milliseconds.
    assert set(named) >= {("1", "waits for data"), ("2", "works on the host")}, logs[0]
    lines = [line for line in read_train_metrics(tmp_path / "run" / "metrics.jsonl") if "hosts/slowest" in line]
    assert {1, 2} <= {line["hosts/slowest"] for line in lines}
    assert "4 processes" in (tmp_path / "run" / "report.html").read_text()


LOSES_A_SLICE = """
import os, signal, sys
from mplug2_jax.cli.main import main
from mplug2_jax.training.telemetry.profiling import Profiler

before_step = Profiler.before_step

def killed(self, step):
    before_step(self, step)
    if step == 6 and os.environ["JAX_PROCESS_ID"] == "3":  # which no process of one slice has
        os.kill(os.getpid(), signal.SIGKILL)

Profiler.before_step = killed
sys.exit(main(sys.argv[1:]))
"""
LAUNCHER = """
import sys
from mplug2_jax.console import configure_logging
from mplug2_jax.launch.local import LocalProcesses, SimulatedSlices

configure_logging()
command = [sys.executable, "-c", sys.argv[1], *sys.argv[2:]]
sys.exit(LocalProcesses(command, 4, 1, slices=SimulatedSlices(2, 1, 4)).run(1))
"""


def test_a_run_that_loses_a_slice_goes_on_with_the_other(tmp_path: Path) -> None:
    """The loss is a plain mean over examples, and there is no dropout: the curves are equal to rounding."""
    examples = ExampleConfig(instructions=ENTAILMENT, instruction_length=16, classes=("yes", "no", "maybe"))
    run = small_run(
        streams={"text": stream("text", 8, examples, classify=1.0)}, evaluations={}, steps=10, log_example_ids=True,
        model=small_model(dropout=0.0, num_classes=3), checkpoint=CheckpointConfig(every_steps=2),
        mesh=MeshConfig(replica=-1, fsdp=2),
    )  # fmt: skip
    words = ["train", "--config", str(recipe_file(run, tmp_path / "recipe.py")), "--workdir"]
    elastic = subprocess.run(
        [sys.executable, "-c", LAUNCHER, LOSES_A_SLICE, *words, str(tmp_path / "elastic")],
        env=environment(tmp_path, 1), capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert elastic.returncode == 0, elastic.stderr
    assert "1 of 2 slices: 2 micro-batches a step" in elastic.stderr
    whole = mplug2(tmp_path, *words, str(tmp_path / "whole"), "--config.mesh.fsdp=1", devices=1)
    assert whole.returncode == 0, whole.stderr

    assert (tmp_path / "elastic/examples.jsonl").read_bytes() == (tmp_path / "whole/examples.jsonl").read_bytes()
    metrics, expected = (read_train_metrics(tmp_path / name / "metrics.jsonl") for name in ("elastic", "whole"))
    assert [line["step"] for line in metrics] == [line["step"] for line in expected] == list(range(1, 11))
    assert_close([line["loss"] for line in metrics], [line["loss"] for line in expected])
    events = read_events(tmp_path / "elastic" / "events.jsonl")
    changed = [line for line in events if line["event"] == "config_changed"]
    assert [(line["field"], line["old"], line["new"]) for line in changed] == [("grad_accum_steps", 1, 2)]


STALLED_DATA = """
original = loop.device_batches
def device_batches(*args):
    yield next(original(*args))
    time.sleep(600)
loop.device_batches = device_batches
"""
STALLED_STEP = """
watchdog.MIN_STEP_SECONDS = 3.0
original = Profiler.before_step
def before_step(self, step):
    original(self, step)
    time.sleep(600 * (step == 9))
Profiler.before_step = before_step
"""


@pytest.mark.parametrize(
    ("fault", "timeout", "message", "function", "field"),
    [
        (STALLED_DATA, 60, "'.* step 2' took longer than config.watchdog_timeout=60", "device_batches", "timeout"),
        (
            STALLED_STEP, 400, "'step 9' took longer than .* s, by config.watchdog_step_medians=20 of .* s",
            "before_step", "step_medians",
        ),
    ],
    ids=["data", "step"],
)  # fmt: skip
def test_a_stalled_run_exits_with_its_stacks(
    folder: Path, tmp_path: Path, fault: str, timeout: int, message: str, function: str, field: str
) -> None:
    code = (
        "import sys, time\nimport mplug2_jax.training.loop as loop\nfrom mplug2_jax.cli.main import main\n"
        "from mplug2_jax.training.reliability import watchdog\n"
        "from mplug2_jax.training.telemetry.profiling import Profiler\n"
        f"{fault}\nsys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--config", str(folder / "recipe.py"), "--workdir", str(tmp_path / "run"),
         *MESH, f"--config.watchdog_timeout={timeout}", "--config.steps=12"],
        env=environment(folder, 8), capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 79, done.stderr
    assert re.search(f"process 0 stalled: {message}", done.stderr), done.stderr
    assert f"in {function}" in done.stderr
    assert f"raise config.watchdog_{field} (0: no limit)" in done.stderr


def test_a_process_whose_others_never_come_exits_before_it_has_joined(folder: Path, tmp_path: Path) -> None:
    words = ["train", "--config", str(folder / "recipe.py"), "--workdir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "mplug2_jax.cli.main", *words, "--config.watchdog_timeout=45"],
        env=environment(folder, 8) | process_environment(1, 2, 4, f"127.0.0.1:{find_free_port()}"),
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 79, done.stderr
    assert "process 1 stalled: 'joining the other processes' took longer than 15 s, 0.33 times config." in done.stderr
    assert "in initialize_distributed" in done.stderr
    assert not (tmp_path / "run").exists()
