"""The sbatch file on a real SLURM: two hosts train, are told to end, and the job goes on where it was."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mplug2_jax.planning.plan_file import PlanFile
from mplug2_jax.training.config import CheckpointConfig
from tests.cli.conftest import command
from tests.launch.slurm_cluster import SlurmCluster, missing, slurm_cluster
from tests.runs import recipe_file, small_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing()), reason=f"SLURM is not installed here: no {', '.join(missing())}"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def submit(cluster: SlurmCluster, folder: Path, program: str, *words: str) -> str:
    """Submits what is rendered, with ``program`` as mplug2; the job's number."""
    (folder / "bin").mkdir()
    (folder / "bin" / "mplug2").write_text(f"#!/bin/bash\n{program}\n")
    (folder / "bin" / "mplug2").chmod(0o755)
    file = folder / "run.sbatch"
    done = command("launch", "slurm", *words, "--name", "drill", "--out", file)
    assert done.status == 0, done.err
    path = f"{folder / 'bin'}:{cluster.environment['PATH']}"
    return cluster.run("sbatch", "--parsable", file, cwd=folder, env={"PATH": path}).strip()


def test_two_hosts_are_preempted_and_go_on(cluster: SlurmCluster, tmp_path: Path) -> None:
    text = small_run().streams["text"]
    text = dataclasses.replace(text, objectives={"mlm": 1.0}, data=dataclasses.replace(text.data, batch_size=16))
    # Only what is saved on notice can bring it back.
    run = small_run(steps=12, streams={"text": text}, evaluations={}, checkpoint=CheckpointConfig(every_steps=1000))
    plan = PlanFile(
        config=str(recipe_file(run, tmp_path / "recipe.py")), overrides=("--config.seed=3",), topology="cpu:16"
    )
    plan.write(tmp_path / "plan.json")
    environment = "export JAX_DISABLE_MOST_OPTIMIZATIONS=1 PYTHONPATH=" + ":".join(sys.path)
    number = submit(
        cluster, tmp_path, f'{environment}\nexec {sys.executable} -m mplug2_jax.cli.main "$@"',
        "--plan", str(tmp_path / "plan.json"), "--workdir", str(tmp_path / "run"),
    )  # fmt: skip
    log, metrics = tmp_path / f"drill-{number}.log", tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    cluster.run("scancel", "--signal=TERM", number)
    job = cluster.wait_for(number, lambda job: job["Restarts"] == "1" and job["JobState"] == "RUNNING", 120)
    assert job["NumNodes"] == "2"
    job = cluster.wait_for(number, lambda job: job["JobState"] not in ("RUNNING", "COMPLETING"), 240)
    said = log.read_text()
    print(said)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("COMPLETED", "1", "0:0"), said
    assert said.count("2 processes (SLURM job") == 2
    assert "ended with status 75 after 0 restarts; queued again" in said
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if "loss" in line]
    assert steps == list(range(1, 13))  # none twice, none left out


QUICK = ("--config", "demo", "--topology", "cpu:16", "--workdir", "runs/quick")


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text().splitlines())


FIRST = 'if [ "$SLURM_PROCID" = 0 ]; then echo start >> starts; fi\n'


def test_a_mistake_is_not_repeated(cluster: SlurmCluster, tmp_path: Path) -> None:
    number = submit(cluster, tmp_path, FIRST + "exit 2", *QUICK)
    job = cluster.wait_for(number, lambda job: job["JobState"] == "FAILED", 60)
    time.sleep(2)
    assert (job["ExitCode"], cluster.job(number)["Restarts"], starts(tmp_path)) == ("2:0", "0", 1)


def test_a_mistake_of_one_host_is_the_run_s(cluster: SlurmCluster, tmp_path: Path) -> None:
    """It takes the others along, whose statuses are higher."""
    program = FIRST + '[ "$SLURM_PROCID" = 0 ] || exit 2\nsleep 1\nkill -ABRT $$'
    number = submit(cluster, tmp_path, program, *QUICK)
    job = cluster.wait_for(number, lambda job: job["JobState"] == "FAILED", 60)
    time.sleep(2)
    assert (job["ExitCode"], cluster.job(number)["Restarts"], starts(tmp_path)) == ("2:0", "0", 1)


def test_a_run_that_slurm_queues_again_does_not_do_it_too(cluster: SlurmCluster, tmp_path: Path) -> None:
    """As for a job of more importance, or by hand."""
    program = "trap 'exit 75' TERM\n" + FIRST + "[ -z $SLURM_RESTART_COUNT ] || exit 0\nwhile true; do sleep 0.1; done"
    number = submit(cluster, tmp_path, program, *QUICK)
    cluster.wait_for(number, lambda _: (tmp_path / "starts").exists(), 60)
    cluster.run("scontrol", "requeue", number)
    job = cluster.wait_for(number, lambda job: job["JobState"] == "COMPLETED", 120)
    assert (job["Restarts"], starts(tmp_path)) == ("1", 2)


def test_a_stalled_run_is_repeated_so_often_and_no_oftener(cluster: SlurmCluster, tmp_path: Path) -> None:
    number = submit(cluster, tmp_path, FIRST + "exit 79", *QUICK, "--max-restarts", "1")
    job = cluster.wait_for(number, lambda job: job["JobState"] == "FAILED", 120)
    assert (job["ExitCode"], job["Restarts"], starts(tmp_path)) == ("79:0", "1", 2)


def test_a_cancelled_run_stays_cancelled(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Though the run ends as a preempted one does."""
    number = submit(cluster, tmp_path, "trap 'exit 75' TERM\n" + FIRST + "while true; do sleep 0.1; done", *QUICK)
    cluster.wait_for(number, lambda _: (tmp_path / "starts").exists(), 60)
    cluster.run("scancel", number)
    cluster.wait_for(number, lambda job: job["JobState"] == "CANCELLED", 60)
    time.sleep(10)
    assert (cluster.job(number)["JobState"], starts(tmp_path)) == ("CANCELLED", 1)


def test_a_run_is_told_to_end_before_its_time_is_up(cluster: SlurmCluster, tmp_path: Path) -> None:
    program = "trap 'exit 75' TERM\n" + FIRST + "[ -z $SLURM_RESTART_COUNT ] || exit 0\nwhile true; do sleep 0.1; done"
    number = submit(cluster, tmp_path, program, *QUICK, "--time", "2:00", "--grace", "50")
    job = cluster.wait_for(number, lambda job: job["JobState"] == "COMPLETED", 120)
    assert (job["Restarts"], starts(tmp_path)) == ("1", 2)
    said = (tmp_path / f"drill-{number}.log").read_text()
    assert "ended with status 75 after 0 restarts; queued again" in said
