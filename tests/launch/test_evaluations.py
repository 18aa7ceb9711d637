"""Evaluations in bfloat16: equal to the byte for any number of processes, and continuous during training."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.config import DataConfig, ExampleConfig, InstructionConfig, SourceConfig
from data_pipelines.digitworld import VIDEO_LABELS
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.training.config import CheckpointConfig
from mplug2_jax.training.telemetry.metric_log import read_step_lines
from tests.cli.conftest import save_random_run
from tests.launch.processes import environment
from tests.runs import QUESTION, SMALL, recipe_file, small_model, small_run, stream, text_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CAPTION = {"caption": InstructionConfig(templates=("what happens?",))}
EVALUATIONS = {
    "questions": ("answer", "image", ExampleConfig(instructions=QUESTION, instruction_length=12, target_length=6)),
    "captions": ("caption", "video", ExampleConfig(instructions=CAPTION, instruction_length=6, target_length=6)),
    "pairs": ("vlc", "video", ExampleConfig(text_length=12)),
    "words": ("mlm", "text", ExampleConfig(text="sentence", text_length=12)),
    "actions": (
        "classify", "video",
        ExampleConfig(instructions={"label": InstructionConfig(templates=("",))}, classes=VIDEO_LABELS),
    ),
}  # fmt: skip


def heldout(task: str, kind: str, examples: ExampleConfig, size: int = 11) -> EvaluationConfig:
    sources = {"digits": SourceConfig(kind=kind, split="heldout", max_records=size)}
    visual = dataclasses.replace(SMALL, num_clips=2, num_crops=3) if task == "classify" else SMALL
    data = DataConfig(sources=sources, visual=visual, examples=examples, batch_size=8)
    return EvaluationConfig(task=task, data=data, num_samples=2)


def start(folder: Path, *words: object, devices: int = 1) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "mplug2_jax.cli.main", *map(str, words)], env=environment(folder, devices), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(process: "subprocess.Popen[str]", status: int = 0) -> str:
    """Wait until a process exits with a status; return its output."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == status, f"{out}\n{err}"
    return f"{out}\n{err}"


# Any number of processes and any batch size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a random model to ``run``, and its evaluations to ``recipe.py``: eleven records of each kind."""
    folder = tmp_path_factory.mktemp("evaluations")
    streams = small_run().streams | {"actions": stream("video", 8, EVALUATIONS["actions"][2], classify=1.0)}
    run = small_run(
        streams=streams, model=small_model(num_classes=len(VIDEO_LABELS), dtype="bfloat16"),
        evaluations={name: heldout(*what) for name, what in EVALUATIONS.items()},
    )  # fmt: skip
    save_random_run(folder / "run", run, scale=1.0)
    recipe_file(run, folder / "recipe.py")
    return folder


def evaluate(folder: Path, name: str, batch_size: int, *launched: object) -> dict[str, bytes]:
    """Run all evaluations; return their files, without durations and report."""
    out = folder / name
    sizes = [f"--config.evaluations.{evaluation}.data.batch_size={batch_size}" for evaluation in EVALUATIONS]
    words = ("eval", "--config", folder / "recipe.py", "--checkpoint", folder / "run", "--out", out, *sizes)
    wait_for(start(folder, *launched, *words))
    files = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    del files["report.html"]  # contains the folder's name
    for evaluation in EVALUATIONS:
        content = json.loads(files[f"{evaluation}.json"])
        assert content.pop("seconds") > 0
        assert content["num_examples"] == 11
        files[f"{evaluation}.json"] = json.dumps(content).encode()
    return files


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, bytes]:
    """Evaluate in one process with one device, in two batches."""
    return evaluate(folder, "single", 8)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_batch_size_changes_nothing(folder: Path, single: dict[str, bytes], batch_size: int) -> None:
    assert evaluate(folder, f"batches-of-{batch_size}", batch_size) == single


@pytest.mark.parametrize("processes", [4])
def test_the_number_of_processes_changes_nothing(folder: Path, single: dict[str, bytes], processes: int) -> None:
    launched = ("launch", "local", "--processes", processes, "--")
    assert evaluate(folder, f"by-{processes}", 8, *launched) == single


def test_predictions_differ_between_records(single: dict[str, bytes]) -> None:
    """Check the premise of the tests above."""
    for name in EVALUATIONS:
        rows = [json.loads(line) for line in single[f"{name}.jsonl"].splitlines()]
        assert len({row["key"] for row in rows}) == 11
        if name == "pairs":  # a random model may retrieve one text for all, but ranks differ
            assert 0 < json.loads(single[f"{name}.json"])["metrics"]["text_to_visual_r5"] < 1
        elif name == "actions":  # it predicts one class for all, which is correct for some
            assert 0 < json.loads(single[f"{name}.json"])["metrics"]["top_1"] < 1
        else:
            assert len({row["prediction"] for row in rows}) > 1, name


# During training


STEPS, EVERY = 300, 30


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Path:
    """Write a recipe that trains for some seconds, keeps two checkpoints, and evaluates after the last step."""
    run = text_run(
        steps=STEPS, evaluations={"words": heldout(*EVALUATIONS["words"])}, log_every=100,
        checkpoint=CheckpointConfig(every_steps=EVERY, keep_last=2),
    )  # fmt: skip
    return recipe_file(run, folder / "words.py")


def wait_until(ready: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 300
    while not ready():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_continuous_evaluation_during_training(
    folder: Path, recipe: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Start the evaluator before the run; preempt it, kill it, and restart it.

    The run is paused at a checkpoint meanwhile; otherwise it may finish before an evaluator on a busy machine starts.
    """
    run, lines = tmp_path / "run", tmp_path / "run" / "metrics-eval.jsonl"
    follow = ("eval", "--workdir", run, "--follow", "--poll", 1)

    def newest() -> int:
        """Return the step of the last checkpoint, or 0."""
        return max((int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdigit()), default=0)

    evaluator = start(folder, *follow)
    training = start(folder, "train", "--config", recipe, "--workdir", run)
    request.addfinalizer(training.kill)  # if paused, it would outlive a failed test
    wait_until(lambda: newest() > 0, training)
    training.send_signal(signal.SIGSTOP)
    wait_until(lambda: lines.exists() and bool(read_step_lines(lines)), evaluator)
    evaluator.send_signal(signal.SIGTERM)
    assert f"waiting for a run in {run}\n" in wait_for(evaluator, status=75)

    before = read_step_lines(lines)
    training.send_signal(signal.SIGCONT)
    wait_until(lambda: newest() > before[-1]["step"], training)
    training.send_signal(signal.SIGSTOP)
    evaluator = start(folder, *follow)
    results = run / "evaluations"
    steps_with_results = lambda: (int(file.parent.name) for file in results.glob("*/words.json"))  # noqa: E731
    wait_until(lambda: max(steps_with_results(), default=0) > before[-1]["step"], evaluator)
    evaluator.kill()  # after the result, which is written last: otherwise the step is evaluated again
    evaluator.communicate()
    training.send_signal(signal.SIGCONT)
    output = wait_for(start(folder, *follow))
    wait_for(training)

    written = read_step_lines(lines)
    steps = [line["step"] for line in written]
    assert steps == sorted(set(steps))
    assert all(step % EVERY == 0 for step in steps)
    assert len(steps) >= 2
    assert f"step {STEPS}" in output
    for line in written:
        (file,) = (results / str(line["step"])).glob("words.json")
        assert json.loads(file.read_text())["metrics"] == {"accuracy": line["eval/words/accuracy"]}
    wait_for(start(folder, "report", run))
    assert "metrics-eval" not in (run / "report.html").read_text()  # no notes about damaged files
