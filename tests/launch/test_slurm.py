"""The sbatch file: its options, and the command of the tasks."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.errors import UserError
from mplug2_jax.launch.job import BundledRecipe
from mplug2_jax.launch.slurm import SlurmOptions, render_slurm
from tests.launch.jobs import HOSTILE, make_job

OPTIONS = SlurmOptions()


def render(topology: str = "h100:64", options: SlurmOptions = OPTIONS, **values: Any) -> str:
    return render_slurm(make_job(topology, **({"workdir": "/shared/demo"} | values)), options).text


def directives(text: str) -> dict[str, str]:
    return {name: value for name, _, value in re.findall(r"^#SBATCH --([\w-]+)(=(.*))?$", text, re.MULTILINE)}


def test_one_task_per_host() -> None:
    options = directives(
        render(grace_period=300, options=SlurmOptions(partition="gpu", account="a-1", time="1-0:30:00"))
    )
    expected = {"nodes": "8", "ntasks-per-node": "1", "gpus-per-node": "8", "signal": "TERM@300", "requeue": ""}
    assert options.items() >= expected.items()
    assert (options["partition"], options["account"], options["time"]) == ("gpu", "a-1", "1-0:30:00")
    assert "partition" not in directives(render())


@pytest.mark.parametrize(
    ("topology", "nodes", "gpus"), [("h100:8", "1", "8"), ("a100:4", "1", "4"), ("cpu:16", "2", None)]
)
def test_devices_per_node(topology: str, nodes: str, gpus: str | None) -> None:
    text = render(topology)
    options = directives(text)
    assert (options["nodes"], options.get("gpus-per-node")) == (nodes, gpus)
    assert ("JAX_PLATFORMS=cuda,cpu" in text) == (gpus is not None)
    assert ("JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8" in text) == (gpus is None)


def test_containers_mount_the_work_directory() -> None:
    text = render(options=SlurmOptions(image="nvcr.io#team/mplug2:1"))
    assert "'--container-image=nvcr.io#team/mplug2:1' --container-mounts=/shared:/shared" in text
    for workdir in ("demo", "/a,b/demo", "/a:b/demo", "/demo"):
        with pytest.raises(UserError, match=f"--workdir {workdir} with --image: expected an absolute path"):
            render(workdir=workdir, options=SlurmOptions(image="a"))


def test_a_work_directory_in_a_bucket() -> None:
    """Pass it on; this machine has no package for the scheme s3, and the recipe is next to the sbatch file."""
    job = make_job("h100:8", workdir="s3://bucket/a b", recipe=BundledRecipe("r.py", "recipe", ":7"))
    submission = render_slurm(job, OPTIONS)
    assert "printf %s recipe > demo.recipe.py\n" in submission.text
    assert "mplug2 train --config demo.recipe.py:7 --workdir 's3://bucket/a b'" in submission.text
    assert submission.notes == (
        "--workdir s3://bucket/a b: the nodes need a connection to it, credentials that can write it, and s3fs (pip "
        "install s3fs)",
    )  # fmt: skip
    text = render_slurm(job, SlurmOptions(image="a")).text
    assert ' --container-image=a --container-mounts="$PWD"/demo.recipe.py:/recipes/demo.py bash ' in text
    assert "--config /recipes/demo.py:7" in text


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"topology": "v5p:2x2x4"}, {}, "--topology v5p:2x2x4: SLURM has no TPUs; use mplug2 launch gke or tpu-vm"),
        ({"topology": "h100:12"}, {}, "--topology h100:12: expected a multiple of 8, .*, as in h100:16"),
        ({"workdir": "ftp://a/b"}, {}, "--workdir ftp://a/b: expected a path on this machine, gs://BUCKET/PATH or s3"),
        ({}, {"partition": "gpu\n#SBATCH --uid=0"}, "--partition 'gpu.*': expected something like --partition gpu"),
        ({}, {"account": "a b"}, "--account 'a b': expected"),
        ({}, {"time": "tomorrow"}, "--time 'tomorrow': expected something like --time 12:00:00"),
        ({"grace_period": 120}, {"time": "3"}, "--time 3 with --grace-period 120: .* expected more than 180 seconds"),
        ({}, {"time": "2:59"}, "--time 2:59 with --grace-period 120: SIGTERM would come right after the start"),
        ({}, {"time": "0:03:00"}, "--time 0:03:00 with"),
        ({}, {"time": "0-0:03"}, "--time 0-0:03 with"),
        ({}, {"image": "a b"}, "--image 'a b': expected"),
    ],
)
def test_errors(values: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        render(options=SlurmOptions(**options), **values)


@pytest.mark.parametrize("time", ["4", "3:01", "0:03:01", "1:00:00", "0-1", "0-0:04", "1-0:00:00"])
def test_time_formats_of_slurm(time: str) -> None:
    assert directives(render(options=SlurmOptions(time=time)))["time"] == time


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an srun that prints its arguments, and no-op versions of the other commands of SLURM."""
    folder = tmp_path_factory.mktemp("bin")
    for name, code in (("srun", "printf '%s\\0' \"$@\""), ("squeue", ""), ("scontrol", "")):
        (folder / name).write_text(f"#!/bin/bash\n{code}\n")
        (folder / name).chmod(0o755)
    return folder


@given(workdir=HOSTILE.filter(lambda text: ":/" not in text), overrides=st.lists(HOSTILE, max_size=3))
def test_values_are_quoted(programs: Path, workdir: str, overrides: list[str]) -> None:
    job = make_job("cpu:16", workdir=workdir, overrides=tuple(overrides))
    text = render_slurm(job, OPTIONS).text
    done = subprocess.run(
        ["/bin/bash", "-c", text], capture_output=True, timeout=20, cwd=programs,
        env={"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    words = done.stdout.split(b"\0")[:-1]
    assert words[words.index(b"mplug2") :] == [os.fsencode(word) for word in job.command()]
    assert directives(text) == directives(render("cpu:16"))


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, 0, False), (2, 0, False), (69, 0, True), (69, 3, False), (75, 3, True), (79, 2, True)],
)
def test_failures_are_requeued(tmp_path: Path, status: int, restarts: int, requeued: bool) -> None:
    for name, code in (("srun", f"exit {status}"), ("squeue", "echo RUNNING"), ("scontrol", "echo $* > called")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{code}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", "SLURM_RESTART_COUNT": str(restarts),
    }  # fmt: skip
    text = render("cpu:16", max_restarts=3)
    done = subprocess.run(["/bin/bash", "-c", text], timeout=20, cwd=tmp_path, env=environment)
    assert (done.returncode, (tmp_path / "called").exists()) == (status, requeued)
