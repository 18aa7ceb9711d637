"""The script around queued resources: run for real, with a gcloud that plays back what the service would say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mplug2_jax.errors import UserError
from mplug2_jax.launch.gke import GkeOptions, launch_gke
from mplug2_jax.launch.job import Job
from mplug2_jax.launch.slurm import SlurmOptions, launch_slurm
from mplug2_jax.launch.tpu_vm import RUNTIMES, TpuVmOptions, launch_tpu_vm
from mplug2_jax.parallel.accelerators import CHIPS
from tests.launch.jobs import HOSTILE, job

IMAGE = "europe-docker.pkg.dev/project/runs/mplug2:1"
OPTIONS = TpuVmOptions(image=IMAGE, zone="us-east5-a")
ALL = TpuVmOptions(image=IMAGE, zone="us-east5-a", project="project", runtime="tpu-ubuntu2204-base", spot=True)

# States and statuses are taken from files, a line each time; what was called is written down.
GCLOUD = """#!/bin/bash
next() { flock lock bash -c 'head -n 1 "$0"; sed -i 1d "$0"' "$1"; }
printf '%s\\0' "$(($# + 1))" gcloud "$@" > call.$$
flock lock bash -c 'cat "$0" >> calls; rm "$0"' call.$$
case "$4" in
  list) next states ;;
  ssh) bash -c "${!##--command=}" ;;
esac
"""
SUDO = '#!/bin/bash\nexec "$@"\n'
DOCKER = """#!/bin/bash
next() { flock lock bash -c 'head -n 1 "$0"; sed -i 1d "$0"' "$1"; }
printf '%s\\0' "$(($# + 1))" docker "$@" > call.$$
flock lock bash -c 'cat "$0" >> calls; rm "$0"' call.$$
if [ "$1" = run ]; then exit "$(next statuses)"; fi
"""
QUIET = "#!/bin/bash\nexit 0\n"
SLEEP = "#!/bin/bash\necho slept >> naps\n"


@pytest.fixture
def cloud(tmp_path: Path) -> Path:
    """A folder whose programs stand in for those of this machine and of the hosts."""
    (tmp_path / "bin").mkdir()
    programs = {"gcloud": GCLOUD, "sudo": SUDO, "docker": DOCKER, "gcsfuse": QUIET, "mountpoint": QUIET, "sleep": SLEEP}
    for name, code in programs.items():
        (tmp_path / "bin" / name).write_text(code)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def played(
    cloud: Path, states: list[str], statuses: list[int], job_: Job | None = None, options: TpuVmOptions = OPTIONS
) -> tuple[int, list[list[str]], str]:
    """Runs the script; its status, what it called, and what it said of errors."""
    (cloud / "states").write_text("".join(f"{state}\n" for state in states))
    (cloud / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    (cloud / "calls").unlink(missing_ok=True)
    text = launch_tpu_vm(job_ or job(), options).text
    path = f"{cloud / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", text], cwd=cloud, env={"PATH": path}, capture_output=True, timeout=40
    )  # fmt: skip
    words, calls = [os.fsdecode(word) for word in (cloud / "calls").read_bytes().split(b"\0")[:-1]], []
    while words:
        count = int(words[0])
        calls.append(words[1 : 1 + count])
        del words[: 1 + count]
    return done.returncode, calls, done.stderr.decode()


def story(calls: list[list[str]]) -> list[str]:
    """The calls that change anything."""
    names = [call[4] if call[0] == "gcloud" and call[1] == "compute" else f"{call[0]} {call[1]}" for call in calls]
    return [name for name in names if name not in ("list", "ssh", "gcloud auth", "docker pull", "docker rm")]


def test_it_waits_trains_and_gives_back(cloud: Path) -> None:
    states = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    status, calls, _ = played(cloud, states, [0])
    assert (status, story(calls)) == (0, ["create", "docker stop", "docker run", "delete"])
    assert len((cloud / "naps").read_text().splitlines()) == 2


def test_it_asks_again_for_what_was_taken_away(cloud: Path) -> None:
    """The connection breaks while the request still looks ACTIVE; then all starts over."""
    states = ["ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", "", "CREATING", "ACTIVE"]
    status, calls, _ = played(cloud, states, [255, 0], job(max_restarts=0))
    assert status == 0
    train = ["docker stop", "docker run"]
    assert story(calls) == [*train, "delete", "create", *train, "delete"]


def test_a_run_that_was_told_to_end_goes_on(cloud: Path) -> None:
    status, calls, _ = played(cloud, ["ACTIVE"] * 4, [75, 75, 75, 0], job(max_restarts=0))
    assert (status, story(calls).count("docker run")) == (0, 4)


def test_a_mistake_is_not_repeated_and_the_machines_stay(cloud: Path) -> None:
    status, calls, said = played(cloud, ["ACTIVE"], [2], options=ALL)
    assert (status, story(calls)) == (2, ["docker stop", "docker run"])
    assert "gcloud compute tpus queued-resources delete demo --zone=us-east5-a --project=project --force" in said


def test_faults_are_counted(cloud: Path) -> None:
    status, calls, said = played(cloud, ["ACTIVE"] * 9, [79, 1, 137, 0], job(max_restarts=2))
    assert (status, story(calls).count("docker run")) == (137, 3)
    assert "demo: ended with status 137, after 2 restarts" in said


def test_a_request_that_failed_is_not_repeated(cloud: Path) -> None:
    status, calls, said = played(cloud, ["FAILED"], [])
    assert (status, story(calls)) == (1, [])
    assert "demo: the request failed; see: gcloud compute tpus queued-resources describe demo --zone=us-east5-a" in said


def test_every_slice_runs_at_once_and_a_mistake_of_one_is_the_run_s(cloud: Path) -> None:
    status, calls, _ = played(cloud, ["ACTIVE"], [134, 2, 134], job(slices=3), ALL)
    assert status == 2
    trained = [call for call in calls if call[4:5] == ["ssh"] and call[-1].endswith("; train")]
    assert sorted(call[5] for call in trained) == ["demo-0", "demo-1", "demo-2"]
    assert all("--worker=all" in call for call in trained)


def test_what_is_asked_for(cloud: Path) -> None:
    def request(job_: Job, options: TpuVmOptions) -> list[str]:
        return next(call for call in played(cloud, ["", "ACTIVE"], [0] * 2, job_, options)[1] if "create" in call)[5:]

    assert request(job("v5e:4x4"), OPTIONS) == [
        "demo", "--zone=us-east5-a", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=demo",
    ]  # fmt: skip
    assert request(job("v5p:2x2x4", 2), ALL) == [
        "demo", "--zone=us-east5-a", "--project=project", "--accelerator-type=v5p-32",
        "--runtime-version=tpu-ubuntu2204-base", "--node-count=2", "--node-prefix=demo", "--spot",
    ]  # fmt: skip
    assert {chip.name for chip in CHIPS.values() if chip.cloud_prefix} == set(RUNTIMES)


def test_gcloud_takes_its_commands(cloud: Path) -> None:
    """As far as it goes without a login: it reads all options before it asks for one."""
    gcloud = shutil.which("gcloud")
    if not gcloud:
        pytest.skip("gcloud is not installed here")
    environment = os.environ | {
        "HOME": str(cloud), "CLOUDSDK_CONFIG": str(cloud / "config"), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        # Nothing is asked for, whoever runs this wherever.
        "CLOUDSDK_CORE_CHECK_GCE_METADATA": "0", "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": "http://127.0.0.1:9/",
    }  # fmt: skip
    environment.pop("GOOGLE_APPLICATION_CREDENTIALS", None)

    def said(words: list[str]) -> str:
        done = subprocess.run(
            [gcloud, *words], env=environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
        assert done.returncode != 0
        return done.stderr

    _, calls, _ = played(cloud, ["SUSPENDED", "", "ACTIVE"], [0] * 2, job(slices=2), ALL)
    distinct = {call[4] + call[5]: call[1:] for call in calls if call[:2] == ["gcloud", "compute"]}
    assert {words[3] for words in distinct.values()} == {"create", "delete", "list", "ssh"}
    for words in distinct.values():
        assert "gcloud auth login" in said(words), words
    assert "unrecognized arguments: --sport" in said([*next(iter(distinct.values())), "--sport"])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(HOSTILE, max_size=3), st.sampled_from(["a b", "$(touch broken)", "it's", '"', "a\nb", "`x`", "EOF"]))
def test_no_value_leaves_its_place(cloud: Path, overrides: list[str], folder: str) -> None:
    """Through the script, gcloud's command and the host's shell."""
    job_ = job(overrides=tuple(overrides), workdir=f"gs://bucket/{folder}")
    status, calls, said = played(cloud, ["ACTIVE"], [0], job_)
    assert status == 0, said
    (trained,) = (call for call in calls if call[:2] == ["docker", "run"])
    assert trained[trained.index(IMAGE) + 1 :] == job_.command(f"/gcs/{folder}")
    assert not (cloud / "broken").exists()


@pytest.mark.parametrize(
    ("values", "options", "sentence"),
    [
        ({"topology": "h100:8"}, {}, "--topology h100:8: tpu-vm starts runs on TPUs only"),
        (
            {"topology": "tpu7x:4x4x4"},
            {},
            "--topology tpu7x:4x4x4: queued resources have no tpu7x; use mplug2 launch gke",
        ),
        ({"workdir": "runs/demo"}, {}, "--workdir runs/demo: expected gs://BUCKET/FOLDER"),
        ({}, {"zone": "a b"}, "--zone 'a b': expected something like --zone us-east5-a"),
        ({}, {"project": "-x"}, "--project '-x': expected"),
        ({}, {"runtime": ""}, "--runtime-version '': expected"),
        ({}, {"image": "$(x)"}, "--image '.*': expected"),
    ],
)
def test_what_the_service_would_not_take_is_a_sentence(
    values: dict[str, Any], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        launch_tpu_vm(job(**values), TpuVmOptions(**({"image": IMAGE, "zone": "a"} | options)))


@pytest.mark.parametrize("which", ["tpu-vm", "tpu-vm of slices", "slurm", "slurm in a container", "slurm on CPUs"])
def test_shellcheck_finds_nothing(which: str, tmp_path: Path) -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not program:
        pytest.skip("shellcheck is not installed here: make test does it")
    shared = {"workdir": "/shared/a 'b'", "overrides": ("--config.name=it's $HOME `x` \n",)}
    bucket = shared | {"workdir": "gs://bucket/a 'b'"}
    text = {
        "tpu-vm": lambda: launch_tpu_vm(job(**bucket), OPTIONS),
        "tpu-vm of slices": lambda: launch_tpu_vm(job("v6e:16x16", 2, **bucket), ALL),
        "slurm": lambda: launch_slurm(job("h100:64", **shared), SlurmOptions(time="12:00:00")),
        "slurm in a container": lambda: launch_slurm(job("h100:64", **shared), SlurmOptions(image="a#b/c:1")),
        "slurm on CPUs": lambda: launch_slurm(job("cpu:16", **shared), SlurmOptions()),
    }[which]().text
    (tmp_path / "script.sh").write_text(text)
    done = subprocess.run(
        [program, "--severity=style", tmp_path / "script.sh"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_gke_has_what_the_service_lacks() -> None:
    assert launch_gke(job("tpu7x:4x4x4"), GkeOptions(image=IMAGE)).submit == ("kubectl", "apply", "-f")
