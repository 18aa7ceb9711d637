"""launch slurm, gke and tpu-vm: what they print, write and run."""

import os
from pathlib import Path

import pytest

from mplug2_jax.planning.plan_file import PlanFile

from .conftest import mplug2

SLURM = ("launch", "slurm", "--config", "demo", "--topology", "h100:16", "--workdir", "/shared/demo")
GKE = (
    "launch", "gke", "--config", "demo", "--topology", "v5p:2x2x4", "--workdir", "gs://bucket/demo",
    "--image", "r/i:1",
)  # fmt: skip
LOCAL = ("launch", "local", "--processes", "4")
TPU_VM = (
    "launch", "tpu-vm", "--config", "demo", "--topology", "v6e:4x4", "--workdir", "gs://bucket/demo",
    "--image", "r/i:1", "--zone", "us-east5-a",
)  # fmt: skip
TARGETS = {
    "slurm": (SLURM, "sbatch", "demo.sbatch"), "gke": (GKE, "kubectl apply -f", "demo.yaml"),
    "tpu-vm": (TPU_VM, "bash", "demo.sh"),
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty folder, with fake schedulers on PATH that record their calls."""
    bin_, folder = tmp_path / "bin", tmp_path / "here"
    bin_.mkdir()
    folder.mkdir()
    for name in ("sbatch", "kubectl", "bash"):
        (bin_ / name).write_text(f'#!/bin/sh\necho {name} "$@" >> called\nexit 7\n')
        (bin_ / name).chmod(0o755)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_without_submit_nothing_runs(here: Path, target: str) -> None:
    words, submit, file = TARGETS[target]
    printed = mplug2(*words)
    assert printed.status == 0, printed.err
    assert f"# to submit (or use --submit):\n$ {submit} {file}\n" in printed.out
    assert list(here.iterdir()) == []
    text = printed.out.partition("\n\n# to submit")[0] + "\n"
    assert mplug2(*words, "--out", "sub.txt").out.startswith(
        f"wrote sub.txt\n# to submit (or use --submit):\n$ {submit}"
    )
    assert (here / "sub.txt").read_text() == text


@pytest.mark.parametrize("target", TARGETS)
def test_submit_runs_the_command(here: Path, target: str) -> None:
    words, submit, file = TARGETS[target]
    done = mplug2(*words, "--submit")
    assert (done.status, done.out) == (7, f"wrote {file}\n$ {submit} {file}\n")
    assert (here / "called").read_text() == f"{submit} {file}\n"
    assert (here / file).exists()


def test_different_files_are_never_overwritten(here: Path) -> None:
    (here / "demo.sbatch").write_text("mine")
    for words in (("--out", "demo.sbatch"), ("--submit",)):
        refused = mplug2(*SLURM, *words)
        assert refused.status == 2
        assert refused.err == (
            "mplug2: error: --out demo.sbatch exists with different content; choose another name, or remove it\n"
        )
    assert (here / "demo.sbatch").read_text() == "mine"
    assert not (here / "called").exists()
    assert mplug2(*SLURM, "--out", "again.sbatch").status == mplug2(*SLURM, "--out", "again.sbatch").status == 0


def test_the_error_of_a_missing_scheduler(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(here))
    refused = mplug2(*SLURM, "--submit")
    assert (refused.status, refused.err) == (
        2, "mplug2: error: sbatch is not installed on this machine; copy the file to one that has it, and submit it "
        "there\n",
    )  # fmt: skip


def test_a_plan_is_launched_with_its_overrides(here: Path) -> None:
    plan = PlanFile(config="demo", overrides=("--config.mesh.replica=2",), topology="v6e:4x4", slices=2)
    plan.write(here / "plan.json")
    printed = mplug2("launch", "gke", "--plan", "plan.json", "--config.seed=7", *GKE[6:])
    assert printed.status == 0, printed.err
    assert '"--config.mesh.replica=2"\n                    - "--config.seed=7"\n' in printed.out
    assert 'gke-tpu-topology: "4x4"' in printed.out
    assert "replicas: 2" in printed.out
    refused = mplug2("launch", "gke", "--plan", "none.json", *GKE[6:])
    assert "none.json does not exist" in refused.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*GKE, "--topology", "h100:8"), "--topology h100:8: gke starts runs on TPUs only"),
        (
            (*SLURM, "--config.mesh.tensor=5"),
            "config.mesh.fsdp=-1, config.mesh.tensor=5: 5 does not divide the 16 devices",
        ),
        (SLURM[:4], "--workdir is missing; give the folder of the run"),
        (("launch", "slurm", "--workdir", "x"), "--config is missing; give --config and --topology, or --plan"),
        ((*TPU_VM, "--spot", "--reserved"), "--reserved: not allowed with argument --spot"),
        ((*SLURM, "--workdir", "gs://b/runs/x"), "--workdir gs://b/runs/x: names of buckets have 3 to 63 characters"),
        ((*TPU_VM, "--mount", "data"), "--mount data: expected gs://BUCKET or gs://BUCKET/FOLDER"),
        ((*GKE, "--min-slices", "2"), "--min-slices=2 must be between 1 and 1"),
        (
            (*GKE, "--slices", "4", "--config.mesh.replica=4", "--min-slices", "3"),
            "--min-slices 3 of 4 slices: a run continues with a number of slices that divides 4; use at most 2",
        ),
        ((*GKE, "--slice-timeout", "60"), "--slice-timeout 60 is not used without --min-slices"),
        ((*LOCAL, "--slices", "3", "--", "train"), "--slices 3 with --processes 4: expected a multiple of the slices"),
        ((*LOCAL, "--slices", "2", "--", "eval", "--workdir", "x"), "--slices 2 with eval: only train has slices"),
    ],
)
def test_errors_are_one_line(here: Path, words: tuple[str, ...], message: str) -> None:
    refused = mplug2(*words)
    assert refused.status == 2
    assert message in refused.err.splitlines()[-1]
    assert refused.out == ""


def test_a_run_may_go_on_with_fewer_slices(here: Path) -> None:
    slices = (*GKE, "--slices", "2", "--config.mesh.replica=-1", "--config.mesh.fsdp=2", "--config.mesh.data=8")
    assert "MPLUG2_MIN_SLICES" not in mplug2(*slices).out
    elastic = mplug2(*slices, "--min-slices", "1").out
    assert 'MPLUG2_MIN_SLICES\n                      value: "1"\n' in elastic
    assert 'MPLUG2_SLICE_TIMEOUT\n                      value: "600"\n' in elastic


@pytest.mark.parametrize("target", ["slurm", "gke", "tpu-vm"])
def test_the_example_of_help_works(here: Path, target: str) -> None:
    shown = mplug2("launch", target, "--help").out
    example = shown.partition("example:\n")[2].split()
    assert example[:3] == ["mplug2", "launch", target]
    assert mplug2(*example[1:]).status == 0


def test_the_old_name_of_the_grace_period_is_accepted(here: Path) -> None:
    assert "--grace " not in mplug2("launch", "slurm", "--help").out
    assert mplug2(*SLURM, "--grace", "50").out == mplug2(*SLURM, "--grace-period", "50").out
    assert "--signal=TERM@50" in mplug2(*SLURM, "--grace", "50").out


def test_spot_pods_have_less_time_to_save(here: Path) -> None:
    for words, seconds in ((GKE, 120), ((*GKE, "--spot"), 15), ((*GKE, "--spot", "--grace-period", "60"), 60)):
        printed = mplug2(*words)
        assert f"terminationGracePeriodSeconds: {seconds}\n" in printed.out
        assert ("\n# --grace-period 60: GKE gives spot pods 15 seconds, unless " in printed.out) == (seconds == 60)
