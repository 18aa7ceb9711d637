"""The sbatch file on a real SLURM: two hosts train, are preempted, and the job resumes."""

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mplug2_jax.planning.plan_file import PlanFile
from mplug2_jax.training.config import CheckpointConfig
from tests.cli.conftest import mplug2
from tests.launch.slurm_cluster import SlurmCluster, missing_programs, slurm_cluster
from tests.runs import recipe_file, text_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing_programs()), reason=f"SLURM is not installed: no {', '.join(missing_programs())}"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def submit(cluster: SlurmCluster, folder: Path, program: str, *words: str) -> str:
    """Submit the rendered file, with ``program`` as mplug2; return the job's number."""
    (folder / "bin").mkdir()
    (folder / "bin" / "mplug2").write_text(f"#!/bin/bash\n{program}\n")
    (folder / "bin" / "mplug2").chmod(0o755)
    file = folder / "run.sbatch"
    done = mplug2("launch", "slurm", "--name", "drill", "--out", file, *words)
    assert done.status == 0, done.err
    path = f"{folder / 'bin'}:{cluster.environment['PATH']}"
    return cluster.run("sbatch", "--parsable", file, cwd=folder, env={"PATH": path}).strip()


def test_two_hosts_resume_after_preemption(cluster: SlurmCluster, tmp_path: Path) -> None:
    # The only checkpoint is the one saved on SIGTERM.
    run = text_run(batch_size=16, steps=12, checkpoint=CheckpointConfig(every_steps=1000))
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
    output = log.read_text()
    print(output)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("COMPLETED", "1", "0:0"), output
    assert output.count("2 processes (SLURM job") == 2
    assert "exit status 75 after 0 restarts: requeued" in output
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if "loss" in line]
    assert steps == list(range(1, 13))  # each exactly once


QUICK = ("--config", "demo", "--topology", "cpu:16", "--workdir", "runs/quick")


def count_starts(folder: Path) -> int:
    return len((folder / "starts").read_text().splitlines())


RECORD_START = 'if [ "$SLURM_PROCID" = 0 ]; then echo start >> starts; fi\n'


def test_a_user_error_is_not_retried(cluster: SlurmCluster, tmp_path: Path) -> None:
    number = submit(cluster, tmp_path, RECORD_START + "exit 2", *QUICK)
    job = cluster.wait_for(number, lambda job: job["JobState"] == "FAILED", 60)
    time.sleep(2)
    assert (job["ExitCode"], cluster.job(number)["Restarts"], count_starts(tmp_path)) == ("2:0", "0", 1)


def test_a_user_error_of_one_host_is_the_status_of_the_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Check that it wins over the higher statuses of the other hosts."""
    program = RECORD_START + '[ "$SLURM_PROCID" = 0 ] || exit 2\nsleep 1\nkill -ABRT $$'
    number = submit(cluster, tmp_path, program, *QUICK)
    job = cluster.wait_for(number, lambda job: job["JobState"] == "FAILED", 60)
    time.sleep(2)
    assert (job["ExitCode"], cluster.job(number)["Restarts"], count_starts(tmp_path)) == ("2:0", "0", 1)


def test_a_job_that_slurm_requeues_does_not_requeue_itself(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Requeue a job by hand, which is like a preemption by SLURM."""
    program = (
        "trap 'exit 75' TERM\n" + RECORD_START + "[ -z $SLURM_RESTART_COUNT ] || exit 0\nwhile true; do sleep 0.1; done"
    )
    number = submit(cluster, tmp_path, program, *QUICK)
    cluster.wait_for(number, lambda _: (tmp_path / "starts").exists(), 60)
    cluster.run("scontrol", "requeue", number)
    job = cluster.wait_for(number, lambda job: job["JobState"] == "COMPLETED", 120)
    assert (job["Restarts"], count_starts(tmp_path)) == ("1", 2)


def test_a_stalled_run_is_retried_max_restarts_times(cluster: SlurmCluster, tmp_path: Path) -> None:
    number = submit(cluster, tmp_path, RECORD_START + "exit 79", *QUICK, "--max-restarts", "1")
    job = cluster.wait_for(number, lambda job: job["JobState"] == "FAILED", 120)
    assert (job["ExitCode"], job["Restarts"], count_starts(tmp_path)) == ("79:0", "1", 2)


def test_a_cancelled_job_stays_cancelled(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Cancel a job whose run exits like a preempted one."""
    number = submit(
        cluster, tmp_path, "trap 'exit 75' TERM\n" + RECORD_START + "while true; do sleep 0.1; done", *QUICK
    )
    cluster.wait_for(number, lambda _: (tmp_path / "starts").exists(), 60)
    cluster.run("scancel", number)
    cluster.wait_for(number, lambda job: job["JobState"] == "CANCELLED", 60)
    time.sleep(10)
    assert (cluster.job(number)["JobState"], count_starts(tmp_path)) == ("CANCELLED", 1)


def test_sigterm_comes_before_the_time_limit(cluster: SlurmCluster, tmp_path: Path) -> None:
    program = (
        "trap 'exit 75' TERM\n" + RECORD_START + "[ -z $SLURM_RESTART_COUNT ] || exit 0\nwhile true; do sleep 0.1; done"
    )
    number = submit(cluster, tmp_path, program, *QUICK, "--time", "2:00", "--grace-period", "50")
    job = cluster.wait_for(number, lambda job: job["JobState"] == "COMPLETED", 120)
    assert (job["Restarts"], count_starts(tmp_path)) == ("1", 2)
    output = (tmp_path / f"drill-{number}.log").read_text()
    assert "exit status 75 after 0 restarts: requeued" in output


def test_an_array_of_data_workers(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Convert with six workers on two nodes, one of which is killed at its first start, and join their work."""
    program = (
        f"export PYTHONPATH={':'.join(sys.path)}\n"
        'case $* in *--worker*2/6) if [ -z "$SLURM_RESTART_COUNT" ]; then kill -KILL $$; fi ;; esac\n'
        f'exec {sys.executable} -m mplug2_jax.cli.main "$@"'
    )
    out = tmp_path / "records"
    command = ("--", "data", "convert", "digitworld:", "--max-records", "60", "--shards", "12", "--out", str(out))
    number = submit(cluster, tmp_path, program, "--workers", "6", "--cpus", "1", *command)
    deadline = time.monotonic() + 120
    while (left := cluster.run("squeue", "--noheader", "--array", "--jobs", number)).strip():
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
    logs = {path.name: path.read_text() for path in sorted(tmp_path.glob("drill-*.log"))}
    print(logs)
    assert len(logs) == 6
    assert "exit status 137 after 0 restarts: requeued" in logs[f"drill-{number}-2.log"]
    assert all("worker " in log and "/6: 10 records" in log for log in logs.values())
    join = mplug2("data", "summary", out)
    print(join.out)
    assert join.status == 0
    assert re.fullmatch(r"60 records, [\d,]+ bytes in 12 of 12 shards\n", join.out)
