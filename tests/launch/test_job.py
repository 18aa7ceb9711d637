"""What is wrong is said before there is a file, in one sentence."""

from pathlib import Path
from typing import Any

import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.launch.job import Bucket, bucket_of, check_shipped, make_job, plan_of
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


def test_containers_have_the_shipped_recipes_only(tmp_path: Path, repository: Path) -> None:
    assert check_shipped(job(config="configs/demo.py")) == "demo"
    assert check_shipped(job(config=str(repository / "configs" / "released.py") + ":caption")) == "released:caption"
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(
        UserError, match=r"--config .*mine.py: the containers do not have this file; put it into configs/"
    ):
        check_shipped(job(config=str(tmp_path / "mine.py")))
