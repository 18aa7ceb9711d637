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
from mplug2_jax.training.telemetry.metric_log import read_train_metrics
from tests.close import assert_close
from tests.data_pipelines.worlds import write_tar
from tests.launch.processes import environment
from tests.runs import recipe_file, text_run

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


def mplug2(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "mplug2_jax.cli.main", *words],
        env=environment(folder, 8), capture_output=True, text=True, timeout=600,
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


def test_a_stalled_run_exits_with_its_stacks(folder: Path, tmp_path: Path) -> None:
    """Stall the data of step 2."""
    code = (
        "import sys, time\nimport mplug2_jax.training.loop as loop\nfrom mplug2_jax.cli.main import main\n"
        "original = loop.device_batches\n"
        "def device_batches(*args):\n"
        "    yield next(original(*args))\n"
        "    time.sleep(600)\n"
        "loop.device_batches = device_batches\nsys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--config", str(folder / "recipe.py"), "--workdir", str(tmp_path / "run"),
         *MESH, "--config.watchdog_timeout=60"],
        env=environment(folder, 8), capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 79, done.stderr
    assert re.search(r"process 0 stalled: '.* step 2' took longer than config.watchdog_timeout=60", done.stderr)
    assert "in device_batches" in done.stderr
