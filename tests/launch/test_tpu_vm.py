"""The script around queued resources, run with a gcloud that plays back recorded states."""

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
from mplug2_jax.launch.gke import GkeOptions, render_gke
from mplug2_jax.launch.job import BundledRecipe, Job
from mplug2_jax.launch.slurm import SlurmOptions, render_slurm
from mplug2_jax.launch.tpu_vm import RUNTIMES, TpuVmOptions, render_tpu_vm
from mplug2_jax.parallel.accelerators import CHIPS
from tests.launch.jobs import HOSTILE, make_job

IMAGE = "europe-docker.pkg.dev/project/runs/mplug2:1"
OPTIONS = TpuVmOptions(image=IMAGE, zone="us-east5-a")
ALL = TpuVmOptions(
    image=IMAGE, zone="us-east5-a", project="project", runtime="tpu-ubuntu2204-base", spot=True, mount="gs://data"
)  # fmt: skip

# States and exit statuses are read from files, line by line; calls are recorded.
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
    """Return a folder with fake programs of this machine and of the hosts."""
    (tmp_path / "bin").mkdir()
    programs = {"gcloud": GCLOUD, "sudo": SUDO, "docker": DOCKER, "gcsfuse": QUIET, "mountpoint": QUIET, "sleep": SLEEP}
    for name, code in programs.items():
        (tmp_path / "bin" / name).write_text(code)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def run_script(
    cloud: Path, states: list[str], statuses: list[int], job: Job | None = None, options: TpuVmOptions = OPTIONS
) -> tuple[int, list[list[str]], str]:
    """Run the script; return its exit status, its calls, and its stderr."""
    (cloud / "states").write_text("".join(f"{state}\n" for state in states))
    (cloud / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    (cloud / "calls").unlink(missing_ok=True)
    text = render_tpu_vm(job or make_job(), options).text
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


def actions(calls: list[list[str]]) -> list[str]:
    """Return the calls that have effects."""
    names = [call[4] if call[0] == "gcloud" and call[1] == "compute" else f"{call[0]} {call[1]}" for call in calls]
    return [name for name in names if name not in ("list", "ssh", "gcloud auth", "docker pull", "docker rm")]


def test_it_waits_trains_and_releases(cloud: Path) -> None:
    states = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    status, calls, _ = run_script(cloud, states, [0])
    assert (status, actions(calls)) == (0, ["create", "docker stop", "docker run", "delete"])
    assert len((cloud / "naps").read_text().splitlines()) == 2


def test_it_requests_preempted_resources_again(cloud: Path) -> None:
    """Break the connection while the request still looks ACTIVE."""
    states = ["ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", "", "CREATING", "ACTIVE"]
    status, calls, _ = run_script(cloud, states, [255, 0], make_job(max_restarts=0))
    assert status == 0
    train = ["docker stop", "docker run"]
    assert actions(calls) == [*train, "delete", "create", *train, "delete"]


def test_a_preempted_run_is_resumed(cloud: Path) -> None:
    status, calls, _ = run_script(cloud, ["ACTIVE"] * 4, [75, 75, 75, 0], make_job(max_restarts=0))
    assert (status, actions(calls).count("docker run")) == (0, 4)


def test_a_user_error_is_not_retried_and_the_machines_stay(cloud: Path) -> None:
    status, calls, err = run_script(cloud, ["ACTIVE"], [2], options=ALL)
    assert (status, actions(calls)) == (2, ["docker stop", "docker run"])
    assert "gcloud compute tpus queued-resources delete demo --zone=us-east5-a --project=project --force" in err


def test_failures_are_counted(cloud: Path) -> None:
    status, calls, err = run_script(cloud, ["ACTIVE"] * 9, [79, 69, 137, 0], make_job(max_restarts=2))
    assert (status, actions(calls).count("docker run")) == (137, 3)
    assert "demo: exit status 137 after 2 restarts: giving up" in err


def test_a_failed_request_is_not_retried(cloud: Path) -> None:
    status, calls, err = run_script(cloud, ["FAILED"], [])
    assert (status, actions(calls)) == (1, [])
    assert "demo: the request failed; run: gcloud compute tpus queued-resources describe demo --zone=us-east5-a" in err


def test_slices_run_in_parallel_and_a_user_error_of_one_is_the_status(cloud: Path) -> None:
    status, calls, _ = run_script(cloud, ["ACTIVE"], [134, 2, 134], make_job(slices=3), ALL)
    assert status == 2
    train_calls = [call for call in calls if call[4:5] == ["ssh"] and call[-1].endswith("; train")]
    assert sorted(call[5] for call in train_calls) == ["demo-0", "demo-1", "demo-2"]
    assert all("--worker=all" in call for call in train_calls)


def test_the_request(cloud: Path) -> None:
    def request(job: Job, options: TpuVmOptions) -> list[str]:
        return next(call for call in run_script(cloud, ["", "ACTIVE"], [0] * 2, job, options)[1] if "create" in call)[
            5:
        ]

    assert request(make_job("v5e:4x4"), OPTIONS) == [
        "demo", "--zone=us-east5-a", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite",
        "--node-id=demo",
    ]  # fmt: skip
    assert request(make_job("v5p:2x2x4", 2), ALL) == [
        "demo", "--zone=us-east5-a", "--project=project", "--accelerator-type=v5p-32",
        "--runtime-version=tpu-ubuntu2204-base", "--node-count=2", "--node-prefix=demo", "--spot",
    ]  # fmt: skip
    assert {chip.name for chip in CHIPS.values() if chip.cloud_prefix} == set(RUNTIMES)


def test_gcloud_accepts_its_commands(cloud: Path) -> None:
    """Run gcloud without a login: it parses all options before it requires one."""
    gcloud = shutil.which("gcloud")
    if not gcloud:
        pytest.skip("gcloud is not installed")
    environment = os.environ | {
        "HOME": str(cloud), "CLOUDSDK_CONFIG": str(cloud / "config"), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        # No request leaves this machine, whatever its configuration.
        "CLOUDSDK_CORE_CHECK_GCE_METADATA": "0", "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": "http://127.0.0.1:9/",
    }  # fmt: skip
    environment.pop("GOOGLE_APPLICATION_CREDENTIALS", None)

    def error_of(words: list[str]) -> str:
        done = subprocess.run(
            [gcloud, *words], env=environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
        assert done.returncode != 0
        return done.stderr

    _, calls, _ = run_script(cloud, ["SUSPENDED", "", "ACTIVE"], [0] * 2, make_job(slices=2), ALL)
    distinct = {call[4] + call[5]: call[1:] for call in calls if call[:2] == ["gcloud", "compute"]}
    assert {words[3] for words in distinct.values()} == {"create", "delete", "list", "ssh"}
    for words in distinct.values():
        assert "gcloud auth login" in error_of(words), words
    assert "unrecognized arguments: --sport" in error_of([*next(iter(distinct.values())), "--sport"])


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(HOSTILE, max_size=3), st.sampled_from(["a b", "$(touch broken)", "it's", '"', "a\nb", "`x`", "EOF"]))
def test_values_are_quoted(cloud: Path, overrides: list[str], folder: str) -> None:
    """Run values through the script, gcloud's command and the shell of the host."""
    job = make_job(overrides=tuple(overrides), workdir=f"gs://bucket/{folder}")
    status, calls, err = run_script(cloud, ["ACTIVE"], [0], job)
    assert status == 0, err
    (train_call,) = (call for call in calls if call[:2] == ["docker", "run"])
    assert train_call[train_call.index(IMAGE) + 1 :] == job.command()
    assert not (cloud / "broken").exists()


def test_a_bucket_is_mounted_only_if_asked_for(cloud: Path) -> None:
    """Check the options of the container and of gcsfuse, which records its call."""
    (cloud / "bin" / "gcsfuse").write_text('#!/bin/bash\nprintf "%s\\n" "$@" > fuse\n')
    (cloud / "bin" / "mountpoint").write_text("#!/bin/bash\nexit 1\n")
    (cloud / "bin" / "mkdir").write_text(QUIET)
    (cloud / "bin" / "mkdir").chmod(0o755)
    mounted = TpuVmOptions(image=IMAGE, zone="us-east5-a", mount="gs://data/a 'b'")
    for options in (OPTIONS, mounted):
        status, calls, err = run_script(cloud, ["ACTIVE"], [0], options=options)
        assert status == 0, err
        (train_call,) = (call for call in calls if call[:2] == ["docker", "run"])
        assert ("/gcs:/gcs:ro" in train_call) == (cloud / "fuse").exists() == (options is mounted)
    words = (cloud / "fuse").read_text().splitlines()
    assert {"ro,allow_other", "--implicit-dirs", "--metadata-cache-ttl-secs=-1", "--only-dir=a 'b'"} <= set(words)
    assert words[-2:] == ["data", "/gcs"]


@pytest.mark.parametrize(
    ("values", "options", "message"),
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
def test_errors(values: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        render_tpu_vm(make_job(**values), TpuVmOptions(**({"image": IMAGE, "zone": "a"} | options)))


@pytest.mark.parametrize(
    "which", ["tpu-vm", "tpu-vm of slices", "slurm", "slurm in a container", "slurm with a bucket", "slurm on CPUs"]
)
def test_shellcheck_finds_nothing(which: str, tmp_path: Path) -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not program:
        pytest.skip("shellcheck is not installed; make test installs it")
    shared = {
        "workdir": "/shared/a 'b'", "overrides": ("--config.name=it's $HOME `x` \n",), "data_folder": "/a 'b'",
        "recipe": BundledRecipe("r.py", "it's $HOME\n", ""),
    }  # fmt: skip
    bucket = shared | {"workdir": "gs://bucket/a 'b'"}
    text = {
        "tpu-vm": lambda: render_tpu_vm(make_job(**bucket), OPTIONS),
        "tpu-vm of slices": lambda: render_tpu_vm(make_job("v6e:16x16", 2, **bucket), ALL),
        "slurm with a bucket": lambda: render_slurm(make_job("h100:64", **bucket), SlurmOptions(image="a#b/c:1")),
        "slurm": lambda: render_slurm(make_job("h100:64", **shared), SlurmOptions(time="12:00:00")),
        "slurm in a container": lambda: render_slurm(make_job("h100:64", **shared), SlurmOptions(image="a#b/c:1")),
        "slurm on CPUs": lambda: render_slurm(make_job("cpu:16", **shared), SlurmOptions()),
    }[which]().text
    (tmp_path / "script.sh").write_text(text)
    done = subprocess.run(
        [program, "--severity=style", tmp_path / "script.sh"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_gke_offers_chips_that_the_service_lacks() -> None:
    assert render_gke(make_job("tpu7x:4x4x4"), GkeOptions(image=IMAGE)).command == ("kubectl", "apply", "-f")
