"""The JobSet: valid by JobSet's schema, with correct restarts; and the commands of xpk."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.errors import PREEMPTED, STALLED, UNAVAILABLE, USER_ERROR, UserError
from mplug2_jax.launch.gke import SPOT_GRACE_PERIOD, GkeOptions, render_gke
from mplug2_jax.launch.job import Job
from mplug2_jax.parallel.accelerators import CHIPS, topology_names
from tests.launch.jobs import HOSTILE, make_job

IMAGE = "europe-docker.pkg.dev/project/runs/mplug2:1"
OPTIONS = GkeOptions(image=IMAGE)
ALL = GkeOptions(
    image=IMAGE, queue="training", namespace="team", service_account="trainer", spot=True, mount="gs://data/ours",
    cluster="pods",
)  # fmt: skip
TPUS = [name for name in topology_names() if CHIPS[name.partition(":")[0]].platform == "tpu"]


def render(job: Job, options: GkeOptions = OPTIONS) -> dict[str, Any]:
    return yaml.safe_load(render_gke(job, options).text)


def replicated_job(jobset: dict[str, Any]) -> dict[str, Any]:
    """Return the only replicated job."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated


def pod(jobset: dict[str, Any]) -> dict[str, Any]:
    return replicated_job(jobset)["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("options", [OPTIONS, ALL])
@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:16x16", "v5p:8x8x8", "tpu7x:4x4x4"])
def test_manifests_are_valid(schemas: Path, topology: str, options: GkeOptions) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed here: make test does it")
    schema = forbid_unknown_fields(json.loads((schemas / "jobset.v1alpha2.schema.json").read_text()))
    validator = jsonschema.Draft202012Validator(schema)
    jobset = render(make_job(topology, 2, grace_period=SPOT_GRACE_PERIOD), options)
    validator.validate(jobset)
    for broken in ("replicaz", "failurePolicy"):  # otherwise the schema accepts everything
        wrong = jobset | {"spec": jobset["spec"] | {broken: 3}}
        assert not validator.is_valid(wrong)


def forbid_unknown_fields(schema: Any) -> Any:
    """Return the schema without unknown fields, as Kubernetes validates with --validate=strict."""
    if isinstance(schema, list):
        return [forbid_unknown_fields(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: forbid_unknown_fields(value) for key, value in schema.items()}
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
        strict.setdefault("additionalProperties", False)
    return strict


def test_elastic_slices_know_the_start_that_they_belong_to(schemas: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed here: make test does it")
    schema = forbid_unknown_fields(json.loads((schemas / "jobset.v1alpha2.schema.json").read_text()))
    elastic = dataclasses.replace(OPTIONS, min_slices=1, slice_timeout=300)
    submission = render_gke(make_job(slices=2), elastic)
    jobset = yaml.safe_load(submission.text)
    jsonschema.Draft202012Validator(schema).validate(jobset)
    (container,) = pod(jobset)["containers"]
    variables = {each.pop("name"): each for each in container["env"]}
    assert variables["MPLUG2_MIN_SLICES"] == {"value": "1"}
    assert variables["MPLUG2_SLICE_TIMEOUT"] == {"value": "300"}
    assert variables["MPLUG2_ATTEMPT"] == {"value": "$(JOBSET_UID)-$(JOBSET_RESTART_ATTEMPT)"}
    assert list(variables).index("MPLUG2_ATTEMPT") > list(variables).index("JOBSET_RESTART_ATTEMPT")
    for name, label in (("JOBSET_UID", "jobset-uid"), ("JOBSET_RESTART_ATTEMPT", "restart-attempt")):
        path = f"metadata.labels['jobset.sigs.k8s.io/{label}']"
        assert variables[name] == {"valueFrom": {"fieldRef": {"fieldPath": path}}}
    assert not submission.alternatives
    assert "MPLUG2_ATTEMPT" not in render_gke(make_job(slices=2), OPTIONS).text


@pytest.mark.parametrize("topology", TPUS)
def test_the_pods_of_a_slice_have_its_chips(topology: str) -> None:
    job = make_job(topology, 3)
    jobset = render(job)
    replicated, spec = replicated_job(jobset), replicated_job(jobset)["template"]["spec"]
    (container,) = pod(jobset)["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert (replicated["replicas"], spec["completions"]) == (3, spec["parallelism"])
    assert chips * spec["completions"] == job.topology.chips_per_slice
    selector = pod(jobset)["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-topology"] == topology.partition(":")[2]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == job.topology.chip.gke_accelerator != ""


def test_options_of_the_cluster() -> None:
    jobset = render(make_job(grace_period=SPOT_GRACE_PERIOD), ALL)
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "training"}
    assert (jobset["metadata"]["namespace"], pod(jobset)["serviceAccountName"]) == ("team", "trainer")
    assert pod(jobset)["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    plain = render(make_job())
    assert {"labels", "namespace"}.isdisjoint(plain["metadata"])
    assert "serviceAccountName" not in pod(plain)
    assert "cloud.google.com/gke-spot" not in pod(plain)["nodeSelector"]


def action_after(jobset: dict[str, Any], status: int) -> str:
    """Return what JobSet does when a pod exits with a status, by the documented rules of Job and JobSet."""
    spec = replicated_job(jobset)["template"]["spec"]
    assert (spec["backoffLimit"], spec["template"]["spec"]["restartPolicy"]) == (0, "Never")
    reason = "BackoffLimitExceeded"
    for rule in spec["podFailurePolicy"]["rules"]:
        codes = rule["onExitCodes"]
        assert codes["containerName"] == pod(jobset)["containers"][0]["name"]
        if (status in codes["values"]) == (codes["operator"] == "In"):
            assert rule["action"] == "FailJob"
            reason = "PodFailurePolicy"
            break
    rules = jobset["spec"]["failurePolicy"]["rules"]
    return next((rule["action"] for rule in rules if reason in rule["onJobFailureReasons"]), "RestartJobSet")


def test_all_slices_restart_except_after_a_user_error() -> None:
    jobset = render(make_job(grace_period=77, max_restarts=5))
    assert action_after(jobset, USER_ERROR) == "FailJobSet"
    for status in (UNAVAILABLE, PREEMPTED, STALLED, 1, 134, 137):
        assert action_after(jobset, status) == "RestartJobSet"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 5
    assert pod(jobset)["terminationGracePeriodSeconds"] == 77


def test_the_work_directory_is_passed_on_and_nothing_is_mounted() -> None:
    text = render_gke(make_job(workdir="gs://bucket/runs/ä b"), OPTIONS).text
    (container,) = pod(yaml.safe_load(text))["containers"]
    assert container["command"][-2:] == ["--workdir", "gs://bucket/runs/ä b"]
    assert "fuse" not in text


def test_a_mount_is_read_only_and_caches_metadata() -> None:
    submission = render_gke(make_job(), GkeOptions(image=IMAGE, mount="gs://data/a b"))
    jobset = yaml.safe_load(submission.text)
    annotations = replicated_job(jobset)["template"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations == {"gke-gcsfuse/volumes": "true"}
    (container,) = pod(jobset)["containers"]
    assert {"name": "data", "mountPath": "/gcs", "readOnly": True} in container["volumeMounts"]
    csi = {volume["name"]: volume for volume in pod(jobset)["volumes"]}["data"]["csi"]
    assert (csi["readOnly"], csi["volumeAttributes"]["bucketName"]) == (True, "data")
    options = csi["volumeAttributes"]["mountOptions"].split(",")
    assert {"implicit-dirs", "metadata-cache:ttl-secs:-1", "only-dir=a b"} <= set(options)
    assert submission.notes[0].startswith("gs://data/a b/FILE is /gcs/FILE on the machines, read-only")


def test_spot_pods_have_the_grace_period_of_gke() -> None:
    spot = GkeOptions(image=IMAGE, spot=True)
    assert render_gke(make_job(grace_period=15), spot).notes == ()
    (note,) = render_gke(make_job(grace_period=16), spot).notes
    assert note.startswith("--grace-period 16: GKE gives spot pods 15 seconds, unless the kubeletConfig of their node")
    assert pod(render(make_job(grace_period=16), spot))["terminationGracePeriodSeconds"] == 16
    with pytest.raises(UserError, match="--grace-period 120 with --spot: GKE gives spot pods at most 105 seconds"):
        render_gke(make_job(grace_period=120), spot)


def expand(word: str) -> str:
    """Return a word of a command as Kubernetes passes it on: $$ is a dollar sign, $(NAME) a variable."""
    assert "$(" not in word.replace("$$", ""), word
    return word.replace("$$", "$")


@given(st.lists(HOSTILE.filter(lambda text: "\udcff" not in text), max_size=3))
def test_values_are_quoted(overrides: list[str]) -> None:
    job = make_job(overrides=tuple(overrides))
    jobset = render(job)
    (container,) = pod(jobset)["containers"]
    assert [expand(word) for word in container["command"]] == job.command()
    container["command"] = pod(plain := render(make_job()))["containers"][0]["command"]
    assert jobset == plain


@given(st.lists(HOSTILE, max_size=3))
def test_xpk_gets_the_same_job(overrides: list[str]) -> None:
    job = make_job(slices=2, overrides=tuple(overrides), grace_period=9, max_restarts=4)
    ((_, (attach, create)),) = render_gke(job, ALL).alternatives
    assert {"--cluster=pods", "--bucket=data", "--mount-point=/gcs", "--readonly=true"} <= set(attach)
    options = dict(word[2:].split("=", 1) for word in create if word.startswith("--"))
    assert options.pop("command").startswith("exec mplug2 train ")
    command = create[-1].removeprefix("--command=exec ")
    assert "\n" not in command  # it becomes lines of YAML
    done = subprocess.run(
        ["bash", "-c", os.fsencode(f"printf '%s\\0' {command}")], capture_output=True, timeout=20, check=True
    )
    assert done.stdout.split(b"\0")[:-1] == [os.fsencode(word) for word in job.command()]
    assert options == {
        "cluster": "pods", "workload": "demo", "tpu-type": "v5p-2x2x4", "num-slices": "2", "docker-image": IMAGE,
        "storage": "demo-bucket", "max-restarts": "4", "restart-on-exit-codes": "1,69,75,79",
        "termination-grace-period-seconds": "9",
    }  # fmt: skip
    ((_, (create,)),) = render_gke(job, OPTIONS).alternatives
    assert not any("storage" in word for word in create)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x1", "v5p:8x8x8", "v6e:16x16", "tpu7x:4x4x4"])
def test_xpk_accepts_its_commands(tmp_path: Path, topology: str) -> None:
    """Run xpk's dry run, which needs no cluster; MPLUG2_XPK names the program if it is not on PATH."""
    xpk = os.environ.get("MPLUG2_XPK") or shutil.which("xpk")
    if not xpk:
        pytest.skip("xpk is not installed: pip install xpk, in a separate environment")
    job = make_job(topology, 2, overrides=("--config.name=it's $(here)",), grace_period=SPOT_GRACE_PERIOD)
    ((_, (attach, create)),) = render_gke(job, ALL).alternatives

    def dry_run(words: tuple[str, ...], *options: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [xpk, *words[1:], "--dry-run", "--skip-validation", "--project=project", "--zone=us-central1-a", *options],
            capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
            env=os.environ | {"HOME": str(tmp_path), "KUBECONFIG": str(tmp_path / "none")},
        )  # fmt: skip

    # Attaching contacts the cluster even in a dry run, so this only checks that it gets that far.
    attached = dry_run(attach)
    assert "Finished get-credentials and kubectl setup" in attached.stdout
    assert attached.stderr.strip().endswith("Invalid kube-config file. No configuration found.")
    done = dry_run(create, f"--output-manifest-file={tmp_path / 'xpk.yaml'}")
    print(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Exiting XPK cleanly" in done.stdout
    xpk_jobset, jobset = yaml.safe_load((tmp_path / "xpk.yaml").read_text()), render(job, ALL)
    for status in (134, 137, UNAVAILABLE, PREEMPTED, STALLED, USER_ERROR, 1):
        assert action_after(xpk_jobset, status) == action_after(jobset, status)
    for key in ("parallelism", "completions", "backoffLimit"):
        assert replicated_job(xpk_jobset)["template"]["spec"][key] == replicated_job(jobset)["template"]["spec"][key]
    assert replicated_job(xpk_jobset)["replicas"] == replicated_job(jobset)["replicas"]
    selector = {key: value for key, value in pod(xpk_jobset)["nodeSelector"].items() if "/gke-tpu-" in key}
    assert len(selector) == 2
    assert selector.items() <= pod(jobset)["nodeSelector"].items()
    assert pod(xpk_jobset)["terminationGracePeriodSeconds"] == pod(jobset)["terminationGracePeriodSeconds"]
    (command,) = (line for line in pod(xpk_jobset)["containers"][0]["command"][2].splitlines() if "mplug2" in line)
    words = shlex.split(command.strip().removeprefix("(exec ").rpartition(")")[0])
    assert words == job.command()


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (
            {"topology": "h100:8"},
            {},
            "--topology h100:8: gke starts runs on TPUs only, .*; for h100 use mplug2 launch sl",
        ),
        ({"workdir": "/data/demo"}, {}, "--workdir /data/demo: expected gs://BUCKET/FOLDER, which outlives the mach"),
        ({"workdir": "s3://data/demo"}, {}, "--workdir s3://data/demo: expected gs://BUCKET/FOLDER, which outlives"),
        ({}, {"mount": "/data"}, "--mount /data: expected gs://BUCKET or gs://BUCKET/FOLDER"),
        ({}, {"mount": "gs://data/a,b"}, "--mount gs://data/a,b: .* without commas"),
        ({}, {"image": "a b"}, "--image 'a b': expected something like --image europe-docker"),
        ({}, {"queue": "A"}, "--queue 'A': expected something like --queue training"),
        ({}, {"namespace": "a_b"}, "--namespace 'a_b': expected"),
        ({}, {"service_account": "-a"}, "--service-account '-a': expected"),
        ({}, {"cluster": "a;b"}, "--cluster 'a;b': expected"),
    ],
)
def test_errors(values: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        render_gke(make_job(**values), GkeOptions(**({"image": IMAGE} | options)))
