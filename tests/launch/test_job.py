"""Jobs are validated before a file is rendered."""

import dataclasses
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mplug2_jax.errors import UserError
from mplug2_jax.launch import job as job_module
from mplug2_jax.launch.gke import GkeOptions, render_gke
from mplug2_jax.launch.job import BundledRecipe, bundle_recipe, check_workdir, describe_input_paths, resolve_plan
from mplug2_jax.launch.slurm import SlurmOptions, render_slurm
from mplug2_jax.launch.templates import quote_word
from mplug2_jax.launch.tpu_vm import TpuVmOptions, render_tpu_vm
from mplug2_jax.parallel.accelerators import parse_topology
from mplug2_jax.planning.plan_file import PlanFile

DEMO = PlanFile(config="demo", overrides=("--config.seed=3",), topology="v5p:2x2x4", slices=2)


def job_of(plan: PlanFile = DEMO, **options: Any) -> job_module.Job:
    defaults = {"workdir": "gs://b-1/Run_7", "name": None, "grace_period": 9, "max_restarts": 0}
    return job_module.make_job(plan, **(defaults | options))


def test_a_plan_file_is_equivalent_to_the_options(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    DEMO.write(file)
    unset: dict[str, Any] = {"config": None, "topology": None, "slices": None}
    from_file = resolve_plan(plan=file, overrides=["--config.steps=4"], **unset)
    assert (from_file.config, from_file.topology, from_file.slices) == ("demo", "v5p:2x2x4", 2)
    assert from_file.overrides == ("--config.seed=3", "--config.steps=4")
    from_options = resolve_plan(plan=None, config="demo", overrides=["--config.seed=3"], topology="v5p:2x2x4", slices=2)
    assert from_options == DEMO
    for option, value in (("config", "demo"), ("topology", "v5e:2x2"), ("slices", 2)):
        with pytest.raises(UserError, match=f"--{option} {value} with --plan .*plan.json: the plan already sets it"):
            resolve_plan(plan=file, overrides=[], **(unset | {option: value}))
    for option in ("config", "topology"):
        options = {"config": "demo", "topology": "v5e:2x2", "slices": None} | {option: None}
        with pytest.raises(UserError, match=f"--{option} is missing; give --config and --topology, or --plan"):
            resolve_plan(plan=None, overrides=[], **options)


def test_a_job_trains_by_the_plan() -> None:
    job = job_of(PlanFile(config="demo", overrides=("--config.mesh.replica=2",), topology="v5p:2x2x4", slices=2))
    assert job.command() == [
        "mplug2", "train", "--config", "demo", "--workdir", "gs://b-1/Run_7", "--config.mesh.replica=2"
    ]  # fmt: skip
    assert (job.name, job.topology.chips, job.grace_period) == ("run-7", 32, 9)


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        ({"overrides": ("--config.sed=3",)}, {}, "config.sed is not a field: did you mean 'seed'"),
        ({"overrides": ("--config.mesh.tensor=3",)}, {}, "3 does not divide the 32 devices"),
        ({}, {}, "config.mesh.replica=1 on v5p:2x2x4 x 2 slices: only the replica axis may cross slices; add --config"),
        ({"slices": 0}, {}, "--slices 0: expected at least 1"),
        ({"topology": "v9:2"}, {}, "--topology v9:2: chip 'v9' is unknown"),
        ({"config": "dmo"}, {}, "recipe 'dmo' is neither a file nor a shipped recipe: did you mean 'demo'"),
        ({"slices": 1}, {"grace_period": 0}, "--grace-period=0 must be between 1 and 3600"),
        ({"slices": 1}, {"max_restarts": -1}, "--max-restarts=-1 must be at least 0"),
        ({"slices": 1}, {"name": "Demo"}, "--name 'Demo': expected at most 40 of a-z, 0-9 and -"),
        ({"slices": 1}, {"name": "a" * 41}, "--name 'a+': expected at most 40"),
        ({"slices": 1}, {"name": "a\n#SBATCH --uid=0"}, "--name .*: expected"),
        ({"slices": 1}, {"workdir": "gs://b-1/777"}, "--name '777': expected .* beginning with a letter"),
    ],
)
def test_errors(plan: dict[str, Any], options: dict[str, Any], message: str) -> None:
    fields = {"config": "demo", "overrides": (), "topology": "v5p:2x2x4", "slices": 2} | plan
    with pytest.raises(UserError, match=message):
        job_of(PlanFile(**fields), **options)


@pytest.mark.parametrize(
    ("workdir", "bucket"),
    [
        ("runs/demo", None), ("/data/x", None), ("gs://my.bucket_1/a b/", ("my.bucket_1", "a b")),
        ("s3://abc/ü/#x?", ("abc", "ü/#x?")), (f"gs://{'a' * 63}.{'b' * 63}/x", (f"{'a' * 63}.{'b' * 63}", "x")),
    ],
)  # fmt: skip
def test_work_directories(workdir: str, bucket: tuple[str, str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check them on a machine without the packages of object stores."""
    monkeypatch.setattr("data_pipelines.storage.file_system._is_installed", lambda _: False)
    assert check_workdir(workdir) == bucket


@pytest.mark.parametrize(
    ("workdir", "message"),
    [
        ("gs://b/runs/x", "names of buckets have 3 to 63 characters, 'b' has 1"),
        (f"gs://{'a' * 64}/x", "names of buckets have 3 to 63 characters, 'a+' has 64"),
        ("gs://Bucket/x", "names of buckets consist of a-z, 0-9, .*, unlike 'Bucket'"),
        ("gs://bucket-/x", "names of buckets .* end with a letter or digit, unlike 'bucket-'"),
        ("gs://bucket/", "expected a folder in the bucket, as in gs://bucket/runs/one"),
        ("gs:///x", "expected gs://BUCKET/PATH"),
        ("gs://bucket/../x", "an object store has no '..'; write the whole path"),
        ("az://bucket/x", "expected a path on this machine, gs://BUCKET/PATH or s3://BUCKET/PATH"),
    ],
)
def test_the_error_of_a_work_directory_names_the_rule(workdir: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^--workdir {workdir}: {message}"):
        check_workdir(workdir)


def test_shipped_recipes_are_named_and_others_are_bundled(tmp_path: Path, repository: Path) -> None:
    assert bundle_recipe("configs/demo.py") == ("demo", None)
    assert bundle_recipe(str(repository / "configs" / "released.py") + ":caption") == ("released:caption", None)
    assert bundle_recipe("msrvtt_qa:tiny") == ("msrvtt_qa:tiny", None)
    (tmp_path / "my recipe.py").write_text("import json\n")
    spec = f"{tmp_path / 'my recipe.py'}:a,b"
    assert bundle_recipe(spec) == (spec, BundledRecipe("my-recipe.py", "import json\n", ":a,b"))
    (tmp_path / "helpers.py").write_text("")
    (tmp_path / "b.py").write_text("from helpers import x\n")
    with pytest.raises(UserError, match=r"b.py imports helpers from .*, which the job does not have"):
        bundle_recipe(str(tmp_path / "b.py"))
    (tmp_path / "long.py").write_text("#" * 2**17)
    with pytest.raises(UserError, match=r"long.py: the limit for recipes of jobs is 64 KiB"):
        bundle_recipe(str(tmp_path / "long.py"))


CUSTOM_RECIPE = """
from mplug2_jax.config import load_recipe


def get_config(arg):
    return load_recipe("demo", [f"--config.seed={arg}"])  # it's "$HOME" \\ `x`
"""


@pytest.fixture
def custom_plan(tmp_path: Path) -> PlanFile:
    """Return a plan with a custom recipe that reads missing files."""
    (tmp_path / "mine.py").write_text(CUSTOM_RECIPE)
    source = "--config.streams.text.data.sources.digits"
    files = (f"{source}.format=files", f"{source}.path={tmp_path}/data", f"--config.tokenizer.path={tmp_path}/mine.py")
    return PlanFile(config=f"{tmp_path / 'mine.py'}:7", overrides=files, topology="v6e:4x4", slices=1)


def test_a_config_map_contains_the_recipe(custom_plan: PlanFile) -> None:
    submission = render_gke(job_of(custom_plan, workdir="gs://bucket/run"), GkeOptions(image="x/y:1", namespace="team"))
    config_map, job_set = yaml.safe_load_all(submission.text)
    assert config_map["metadata"] == {"name": "run-recipe", "namespace": "team"}
    assert config_map["data"] == {"mine.py": CUSTOM_RECIPE}
    pod = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"][:4] == ["mplug2", "train", "--config", "/recipes/mine.py:7"]
    assert {"name": "recipe", "mountPath": "/recipes", "readOnly": True} in pod["containers"][0]["volumeMounts"]
    assert {"name": "recipe", "configMap": {"name": "run-recipe"}} in pod["volumes"]
    assert submission.alternatives == ()


def test_scripts_write_the_recipe_to_the_path_of_their_command(custom_plan: PlanFile, tmp_path: Path) -> None:
    slurm = PlanFile(config=custom_plan.config, overrides=custom_plan.overrides, topology="h100:8", slices=1)
    workdir = tmp_path / "it's $HOME" / "run"
    text = render_slurm(job_of(slurm, workdir=str(workdir)), SlurmOptions()).text
    (line,) = [line for line in text.splitlines() if line.startswith("mkdir -p ")]
    subprocess.run(["bash", "-c", line], check=True)
    assert (workdir.parent / "run.recipe.py").read_text() == CUSTOM_RECIPE
    assert f"--config {quote_word(f'{workdir.parent}/run.recipe.py:7')} " in text

    text = render_tpu_vm(job_of(custom_plan), TpuVmOptions(image="x/y:1", zone="us-east5-a")).text
    (line,) = [line for line in text.splitlines() if line.startswith("  printf %s ")]
    done = subprocess.run(["bash", "-c", line.replace("> /tmp/mplug2-recipe.py", "")], check=True, capture_output=True)
    assert done.stdout.decode() == CUSTOM_RECIPE
    assert "--volume /tmp/mplug2-recipe.py:/recipes/mine.py:ro x/y:1" in text
    assert "--config /recipes/mine.py:7" in text


def test_notes_about_inputs(custom_plan: PlanFile, tmp_path: Path) -> None:
    overrides = (*custom_plan.overrides, "--config.init_from=gs://bucket/old")
    job = job_of(PlanFile(config=custom_plan.config, overrides=overrides, topology="v6e:4x4", slices=1))
    local, remote, missing = describe_input_paths(job.input_paths, None)
    assert local.endswith("mine.py: found on this machine; the nodes must have it, too")
    assert remote == "config.init_from=gs://bucket/old: not checked here; the machines must be able to read it"
    assert missing.endswith("/data: missing on this machine; the nodes must have it")
    for mounted, only in (((), "the image"), (("/gcs",), "/gcs and the image")):
        notes = describe_input_paths(job.input_paths, mounted)
        assert all(f"not in the containers, which have only {only}; move it to a bucket" in note for note in notes[::2])
    assert "not checked here" in describe_input_paths(job.input_paths, (str(tmp_path),))[0]
    assert (
        describe_input_paths(
            job_of(PlanFile(config="demo", overrides=(), topology="v6e:4x4", slices=1)).input_paths, ()
        )
        == ()
    )


def test_machines_have_the_data_folder_that_was_checked(
    custom_plan: PlanFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLUG2_DATA", "gs://nothing/of/the/run")
    assert job_of(custom_plan).data_folder == ""
    monkeypatch.setenv("MPLUG2_DATA", f"{tmp_path}/data")
    job = job_of(custom_plan)
    tpu_vm = render_tpu_vm(job, TpuVmOptions(image="x/y:1", zone="us-east5-a")).text
    assert f"--env MPLUG2_DATA={tmp_path}/data" in tpu_vm
    gke = render_gke(dataclasses.replace(job, recipe=None, data_folder="/$(a) b"), GkeOptions(image="x/y:1"))
    assert '- name: MPLUG2_DATA\n                      value: "/$$(a) b"\n' in gke.text
    assert gke.alternatives[0][1][0][-1].startswith("--command=exec env 'MPLUG2_DATA=/$(a) b' mplug2 train ")
    slurm = dataclasses.replace(job, topology=parse_topology("h100:8", 1), workdir="/shared/x")
    assert f"export MPLUG2_DATA={tmp_path}/data\n" in render_slurm(slurm, SlurmOptions()).text
