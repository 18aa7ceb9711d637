"""A run that is killed and resumed has the losses, bit for bit, of an uninterrupted one. With real processes."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mplug2_jax.training.telemetry.metric_log import read_train_metrics
from tests.runs import recipe_file, small_model, small_run

STEPS = 60  # enough that the kill after the fifth comes before the last, however busy the machine is


def recipe(tmp_path: Path) -> Path:
    streams = {
        "image_text": dataclasses.replace(small_run().streams["image_text"], objectives={"vlc": 1.0}),
        "text": dataclasses.replace(small_run().streams["text"], objectives={"mlm": 1.0}),
    }
    run = small_run(steps=STEPS, streams=streams, evaluations={}, model=small_model(attention_dropout=0.1))
    return recipe_file(run, tmp_path / "recipe.py")


def command(recipe: Path, workdir: Path) -> list[str]:
    return [
        sys.executable, "-m", "mplug2_jax.cli.main", "train", "--config", str(recipe), "--workdir", str(workdir)
    ]  # fmt: skip


def losses(workdir: Path) -> list[dict[str, float]]:
    timings = re.compile(r"data_wait|seconds_per_step|.*per_second.*|mfu|goodput/.*")
    return [
        {name: value for name, value in line.items() if not timings.fullmatch(name)}
        for line in read_train_metrics(workdir / "metrics.jsonl")
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, repository: Path) -> None:
    path = recipe(tmp_path)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    uninterrupted = tmp_path / "through"
    subprocess.run(command(path, uninterrupted), check=True, cwd=repository, env=environment, capture_output=True)
    assert [line["step"] for line in losses(uninterrupted)] == list(range(1, STEPS + 1))

    killed = tmp_path / "killed"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command(path, killed), cwd=repository, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            metrics = killed / "metrics.jsonl"
            if metrics.exists() and len(losses(killed)) >= 5:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    before = losses(killed)
    assert 5 <= len(before) < STEPS

    resumed = subprocess.run(command(path, killed), cwd=repository, env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from step" in resumed.stderr
    assert losses(killed) == losses(uninterrupted)
