"""Data workers: the sbatch file of an array, the Indexed Job of GKE, and processes of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.sources.array_record import ArrayRecordSource
from mplug2_jax.errors import USER_ERROR, UserError
from mplug2_jax.launch.data_job import DataJob
from mplug2_jax.launch.gke import GkeOptions, render_indexed_job
from mplug2_jax.launch.slurm import SlurmOptions, render_slurm_array
from tests.cli.conftest import mplug2
from tests.data_pipelines.worlds import img2dataset
from tests.launch.jobs import HOSTILE
from tests.launch.test_gke import forbid_unknown_fields

OPTIONS = GkeOptions(image="registry/mplug2:1")
ALL = GkeOptions(
    image="registry/mplug2:1", queue="data", namespace="team", service_account="writer", spot=True, mount="gs://data"
)


def make_job(**values: Any) -> DataJob:
    fields: dict[str, Any] = {
        "words": ("data", "index", "gs://bucket/tars"), "out": "gs://bucket/tars", "workers": 8, "cpus": 4,
        "name": "tars", "max_restarts": 3,
    }  # fmt: skip
    return DataJob(**(fields | values))


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an mplug2 that prints its arguments and exits with $STATUS, and a scontrol that leaves a file."""
    folder = tmp_path_factory.mktemp("bin")
    for name, code in (("mplug2", "printf '%s\\0' \"$@\"\nexit ${STATUS:-0}"), ("scontrol", 'echo "$@" > "$CALLED"')):
        (folder / name).write_text(f"#!/bin/bash\n{code}\n")
        (folder / name).chmod(0o755)
    return folder


def run_script(programs: Path, text: str, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "5"}
    return subprocess.run(["/bin/bash", "-c", text], capture_output=True, timeout=20, cwd=programs, env=environment)


@given(words=st.lists(HOSTILE, max_size=3), data_folder=HOSTILE)
def test_words_are_quoted(programs: Path, words: list[str], data_folder: str) -> None:
    job = make_job(words=("data", "index", *words), data_folder=data_folder)
    done = run_script(programs, render_slurm_array(job, SlurmOptions()).text)
    assert (done.returncode, done.stderr) == (0, b"")
    expected = [*job.words, "--worker", "5/8"]
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(word) for word in expected]
    container = yaml.safe_load(render_indexed_job(job, OPTIONS).text)["spec"]["template"]["spec"]["containers"][0]
    *command, option, worker = container["command"]
    assert [word.replace("$$", "$") for word in command] == job.command
    assert (option, worker) == ("--worker", "$(JOB_COMPLETION_INDEX)/8")


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"), [(0, 0, False), (2, 0, False), (69, 0, True), (137, 2, True), (69, 3, False)]
)
def test_failures_are_requeued(programs: Path, tmp_path: Path, status: int, restarts: int, requeued: bool) -> None:
    called = tmp_path / "called"
    text = render_slurm_array(make_job(), SlurmOptions()).text
    done = run_script(programs, text, STATUS=str(status), SLURM_RESTART_COUNT=str(restarts), CALLED=str(called))
    assert (done.returncode, called.exists()) == (status, requeued)


@pytest.mark.parametrize("options", [OPTIONS, ALL])
def test_the_job_is_valid(schemas: Path, options: GkeOptions) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed here: make test does it")
    jobset = json.loads((schemas / "jobset.v1alpha2.schema.json").read_text())
    replicated = jobset["properties"]["spec"]["properties"]["replicatedJobs"]["items"]["properties"]
    schema = forbid_unknown_fields(replicated["template"]["properties"]["spec"])
    job = yaml.safe_load(render_indexed_job(make_job(data_folder="gs://bucket/data"), options).text)
    jsonschema.Draft202012Validator(schema).validate(job["spec"])
    assert (job["apiVersion"], job["kind"], job["metadata"]["name"]) == ("batch/v1", "Job", "tars")
    spec = job["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (8, 8, "Indexed")
    assert (spec["backoffLimitPerIndex"], spec["template"]["spec"]["restartPolicy"]) == (3, "Never")
    (rule, disruption) = spec["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailIndex", [USER_ERROR])
    assert disruption["action"] == "Ignore"
    pod = spec["template"]["spec"]
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert pod["containers"][0]["env"] == [{"name": "MPLUG2_DATA", "value": "gs://bucket/data"}]
    assert bool(spec.get("suspend")) == (options.queue is not None)
    assert pod.get("nodeSelector") == ({"cloud.google.com/gke-spot": "true"} if options.spot else None)


def test_the_output_of_pods_is_in_a_bucket() -> None:
    with pytest.raises(UserError, match=r"/shared/tars: expected an output in gs://BUCKET/FOLDER, which outlives"):
        render_indexed_job(make_job(out="/shared/tars"), OPTIONS)


WORKERS = ("launch", "slurm", "--workers", "4")
CONVERT = ("--", "data", "convert", "digitworld:", "--max-records", "20")


def test_what_slurm_prints(tmp_path: Path) -> None:
    done = mplug2(*WORKERS, "--cpus", 3, "--partition", "cpu", *CONVERT, "--shards", 8, "--out", "/shared/records")
    assert done.status == 0, done.err
    for line in (
        "#SBATCH --array=0-3",
        "#SBATCH --cpus-per-task=3",
        "#SBATCH --partition=cpu",
        "mplug2 data convert digitworld: --max-records 20 --shards 8 --out /shared/records \\",
        "# /shared/records: the nodes must share it",
        "$ sbatch records.sbatch",
        "$ mplug2 data summary /shared/records",
        "$ sbatch --dependency=afterany:JOB --wrap 'mplug2 data summary /shared/records'",
    ):
        assert line in done.out.splitlines()
    (tmp_path / "a.tar").write_bytes(b"")
    done = mplug2(
        "launch", "gke", "--workers", 4, "--image", "i", "--", "data", "index", tmp_path, "--index", "gs://bucket/x"
    )
    assert f"# PATH={tmp_path}: not in the containers, which have only the image" in done.out
    assert "$ mplug2 data index" in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (WORKERS, "--workers 4 with no command: expected both, as in --workers 64 -- data index"),
        (
            ("launch", "slurm", *CONVERT),
            "no --workers with the command 'data convert digitworld: --max-records 20'",
        ),
        ((*WORKERS, "--", "train", "--config", "demo"), "--workers 4 with the command 'train --config demo': expected"),
        ((*WORKERS, "--workdir", "x", *CONVERT), "--workdir is for training runs, and --workers starts data workers"),
        ((*WORKERS, "--config.steps=3", *CONVERT), "--config.steps=3 is for training runs, and --workers starts data"),
        (("launch", "slurm", "--cpus", "2"), "--cpus 2 is for data workers; set --workers too, or remove it"),
        ((*WORKERS, "--image", "x", *CONVERT, "--out", "o", "--shards", "4"), "--image x: data workers run in the env"),
        (
            (*WORKERS, *CONVERT, "--out", "o"),
            "--workers 4 with --shards 1: some workers would have nothing to do",
        ),
        ((*WORKERS, *CONVERT, "--out", "o", "--worker", "0/3"), "--worker 0/3: mplug2 launch sets it; remove it"),
        ((*WORKERS, "--", "data", "validate", "digitworld:"), "data validate for several workers: expected --out DIR"),
        ((*WORKERS, "--", "data", "show", "demo"), "data show does not run on several workers"),
        (("launch", "slurm", "--workers", "0", *CONVERT, "--out", "o"), "--workers=0 must be at least 1"),
        (("launch", "local", "--processes", "2", *CONVERT, "--out", "o"), "--workers 2 with --shards 1: some workers"),
    ],
)
def test_wrong_options_are_one_sentence(words: tuple[str, ...], message: str) -> None:
    refused = mplug2(*words)
    assert (refused.status, refused.out) == (2, "")
    assert refused.err.startswith(f"mplug2: error: {message}")


def test_workers_of_this_machine(tmp_path: Path) -> None:
    """Index tars and convert them with three processes, whose work is joined."""
    (tmp_path / "tars").mkdir()
    for i in range(3):
        img2dataset(tmp_path / "tars" / f"{i}.tar", 3)

    def launch(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "mplug2_jax.cli.main", "launch", "local", "--processes", "3", "--", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)

    done = launch("data", "index", "tars")
    assert done.returncode == 0, done.stderr
    *workers, joined = done.stdout.splitlines()
    assert sorted(workers) == [f"[{i}] worker {i}/3: 1 of 3 tars; 1 scanned, 0 up to date" for i in range(3)]
    assert joined == f"{tmp_path}/tars/merged.index: 9 samples in 3 tars; 0 scanned, 3 up to date"
    done = launch("data", "convert", "webdataset:tars", "--shards", "4", "--out", "records")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(" bytes in 4 of 4 shards")
    out = tmp_path / "records"
    assert len(ArrayRecordSource(str(out))) == 9
    (out / "data-00002-of-00004.json").unlink()
    missing = mplug2("data", "summary", out)
    assert (missing.status, missing.out.splitlines()[0]) == (1, "missing: data-00002-of-00004.array_record")
    assert json.loads(mplug2("data", "summary", out, "--json").out)["shards"] == 3
    refused = mplug2("data", "summary", tmp_path / "tars")
    assert (refused.status, "has no job.json: expected the --out folder of data convert" in refused.err) == (2, True)
