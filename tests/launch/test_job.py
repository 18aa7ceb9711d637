"""What is wrong is said before there is a file, in one sentence."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from mplug2_jax.errors import UserError
from mplug2_jax.launch.gke import GkeOptions, launch_gke
from mplug2_jax.launch.job import Bucket, Recipe, bucket_of, bundle_recipe, make_job, notes_on, plan_of
from mplug2_jax.launch.slurm import SlurmOptions, launch_slurm
from mplug2_jax.launch.templates import quote_word
from mplug2_jax.launch.tpu_vm import TpuVmOptions, launch_tpu_vm
from mplug2_jax.planning.plan_file import PlanFile
from tests.launch.jobs import job

DEMO = PlanFile(config="demo", overrides=("--config.seed=3",), topology="v5p:2x2x4", slices=2)


def made(plan: PlanFile = DEMO, **options: Any) -> Any:
    return make_job(plan, **({"workdir": "gs://b-1/Run_7", "name": None, "grace": 9, "max_restarts": 0} | options))


def test_a_plan_says_what_the_options_say(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    DEMO.write(file)
    nothing: dict[str, Any] = {"config": None, "topology": None, "slices": None}
    read = plan_of(plan=file, overrides=["--config.steps=4"], **nothing)
    assert (read.config, read.topology, read.slices) == ("demo", "v5p:2x2x4", 2)
    assert read.overrides == ("--config.seed=3", "--config.steps=4")
    said = plan_of(plan=None, config="demo", overrides=["--config.seed=3"], topology="v5p:2x2x4", slices=2)
    assert said == DEMO
    for option, value in (("config", "demo"), ("topology", "v5e:2x2"), ("slices", 2)):
        with pytest.raises(UserError, match=f"--{option} {value} with --plan .*plan.json: the plan says it already"):
            plan_of(plan=file, overrides=[], **(nothing | {option: value}))
    for option in ("config", "topology"):
        given = {"config": "demo", "topology": "v5e:2x2", "slices": None} | {option: None}
        with pytest.raises(UserError, match=f"--{option} is missing; give --config and --topology, or --plan"):
            plan_of(plan=None, overrides=[], **given)


def test_a_job_trains_what_was_planned() -> None:
    planned = made(PlanFile(config="demo", overrides=("--config.mesh.replica=2",), topology="v5p:2x2x4", slices=2))
    assert planned.command("/gcs/x") == [
        "mplug2", "train", "--config", "demo", "--workdir", "/gcs/x", "--config.mesh.replica=2"
    ]  # fmt: skip
    assert (planned.name, planned.topology.chips, planned.grace) == ("run-7", 32, 9)


@pytest.mark.parametrize(
    ("plan", "options", "sentence"),
    [
        ({"overrides": ("--config.sed=3",)}, {}, "config.sed is not a field: did you mean 'seed'"),
        ({"overrides": ("--config.mesh.tensor=3",)}, {}, "3 does not divide the 32 devices"),
        (
            {},
            {},
            "config.mesh.replica=1 on v5p:2x2x4 x 2 slices: only replicas may cross slices; add --config.mesh.rep",
        ),
        ({"slices": 0}, {}, "--slices 0: expected at least 1"),
        ({"topology": "v9:2"}, {}, "--topology v9:2: chip 'v9' is unknown"),
        ({"config": "dmo"}, {}, "recipe 'dmo' is neither a file nor a shipped recipe: did you mean 'demo'"),
        ({"slices": 1}, {"grace": 0}, "--grace=0 must be between 1 and 3600"),
        ({"slices": 1}, {"max_restarts": -1}, "--max-restarts=-1 must be at least 0"),
        ({"slices": 1}, {"name": "Demo"}, "--name 'Demo': expected at most 40 of a-z, 0-9 and -"),
        ({"slices": 1}, {"name": "a" * 41}, "--name 'a+': expected at most 40"),
        ({"slices": 1}, {"name": "a\n#SBATCH --uid=0"}, "--name .*: expected"),
        ({"slices": 1}, {"workdir": "gs://b-1/777"}, "--name '777': expected .* beginning with a letter"),
    ],
)
def test_what_is_wrong_is_a_sentence(plan: dict[str, Any], options: dict[str, Any], sentence: str) -> None:
    fields = {"config": "demo", "overrides": (), "topology": "v5p:2x2x4", "slices": 2} | plan
    with pytest.raises(UserError, match=sentence):
        made(PlanFile(**fields), **options)


def test_a_bucket_is_a_folder_of_the_container() -> None:
    assert bucket_of(job()) == Bucket("bucket", "runs/demo")
    assert bucket_of(job(workdir="gs://my.bucket-1/a b/")).workdir == "/gcs/a b"


@pytest.mark.parametrize(
    "workdir",
    [
        "/data/run", "runs/demo", "gs://bucket", "gs://bucket/", "gs:///x", "gs://b/x", "gs://bucket/../x",
        "gs://bucket/a/..", "s3://bucket/x", "gs://Bucket/x",
    ],
)  # fmt: skip
def test_what_is_no_bucket_is_lost_with_the_machine(workdir: str) -> None:
    with pytest.raises(UserError, match=f"--workdir {workdir}: expected gs://BUCKET/FOLDER"):
        bucket_of(job(workdir=workdir))


def test_a_shipped_recipe_goes_by_its_name_and_another_goes_along(tmp_path: Path, repository: Path) -> None:
    assert bundle_recipe("configs/demo.py") == ("demo", None)
    assert bundle_recipe(str(repository / "configs" / "released.py") + ":caption") == ("released:caption", None)
    assert bundle_recipe("msrvtt_qa:tiny") == ("msrvtt_qa:tiny", None)
    (tmp_path / "my recipe.py").write_text("import json\n")
    spec = f"{tmp_path / 'my recipe.py'}:a,b"
    assert bundle_recipe(spec) == (spec, Recipe("my-recipe.py", "import json\n", ":a,b"))
    (tmp_path / "helpers.py").write_text("")
    (tmp_path / "b.py").write_text("from helpers import x\n")
    with pytest.raises(UserError, match=r"b.py imports helpers of .*, which the job would not have"):
        bundle_recipe(str(tmp_path / "b.py"))
    (tmp_path / "long.py").write_text("#" * 2**17)
    with pytest.raises(UserError, match=r"long.py: a job carries recipes of up to 64 KiB"):
        bundle_recipe(str(tmp_path / "long.py"))


MINE = """
from mplug2_jax.config import load_recipe


def get_config(arg):
    return load_recipe("demo", [f"--config.seed={arg}"])  # it's "$HOME" \\ `x`
"""


@pytest.fixture
def mine(tmp_path: Path) -> PlanFile:
    """A run by a recipe of one's own, on files that are not here."""
    (tmp_path / "mine.py").write_text(MINE)
    source = "--config.streams.text.data.sources.digits"
    files = (f"{source}.format=files", f"{source}.path={tmp_path}/data", f"--config.tokenizer.path={tmp_path}/mine.py")
    return PlanFile(config=f"{tmp_path / 'mine.py'}:7", overrides=files, topology="v6e:4x4", slices=1)


def test_a_config_map_brings_the_recipe(mine: PlanFile) -> None:
    launch = launch_gke(made(mine, workdir="gs://bucket/run"), GkeOptions(image="x/y:1", namespace="team"))
    config_map, job_set = yaml.safe_load_all(launch.text)
    assert config_map["metadata"] == {"name": "run-recipe", "namespace": "team"}
    assert config_map["data"] == {"mine.py": MINE}
    pod = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"][:4] == ["mplug2", "train", "--config", "/recipes/mine.py:7"]
    assert {"name": "recipe", "mountPath": "/recipes", "readOnly": True} in pod["containers"][0]["volumeMounts"]
    assert {"name": "recipe", "configMap": {"name": "run-recipe"}} in pod["volumes"]
    assert launch.others == ()


def test_scripts_write_the_recipe_where_their_command_reads_it(mine: PlanFile, tmp_path: Path) -> None:
    slurm = PlanFile(config=mine.config, overrides=mine.overrides, topology="h100:8", slices=1)
    workdir = tmp_path / "it's $HOME" / "run"
    text = launch_slurm(made(slurm, workdir=str(workdir)), SlurmOptions()).text
    (line,) = [line for line in text.splitlines() if line.startswith("mkdir -p ")]
    subprocess.run(["bash", "-c", line], check=True)
    assert (workdir.parent / "run.recipe.py").read_text() == MINE
    assert f"--config {quote_word(f'{workdir.parent}/run.recipe.py:7')} " in text

    text = launch_tpu_vm(made(mine), TpuVmOptions(image="x/y:1", zone="us-east5-a")).text
    (line,) = [line for line in text.splitlines() if line.startswith("  printf %s ")]
    said = subprocess.run(["bash", "-c", line.replace("> /tmp/mplug2-recipe.py", "")], check=True, capture_output=True)
    assert said.stdout.decode() == MINE
    assert "--volume /tmp/mplug2-recipe.py:/recipes/mine.py:ro x/y:1" in text
    assert "--config /recipes/mine.py:7" in text


def test_what_the_job_may_lack_is_said(mine: PlanFile, tmp_path: Path) -> None:
    overrides = (*mine.overrides, "--config.init_from=gs://bucket/old")
    planned = made(PlanFile(config=mine.config, overrides=overrides, topology="v6e:4x4", slices=1))
    here, there, bucket = notes_on(planned, None)
    assert here.endswith("mine.py: it is here; whether the nodes see it, too, cannot be known from here")
    assert there == "config.init_from=gs://bucket/old: whether it is there, and may be read, cannot be known from here"
    assert bucket.endswith("/data: it is not here; the nodes must have it")
    assert all("the containers have /gcs and what the image holds" in note for note in notes_on(planned, "/gcs")[::2])
    assert notes_on(made(PlanFile(config="demo", overrides=(), topology="v6e:4x4", slices=1)), "/gcs") == ()
