"""Cloud TPU VMs: a script around gcloud's queued resources, which requests preempted resources again."""

import dataclasses

from mplug2_jax.errors import PREEMPTED, USER_ERROR, UserError
from mplug2_jax.launch.gke import IMAGE
from mplug2_jax.launch.job import (
    MOUNT,
    RECIPES,
    Bucket,
    Job,
    Submission,
    check_google_workdir,
    check_option,
    check_tpu,
    describe_input_paths,
    describe_mount,
    parse_mount,
)
from mplug2_jax.launch.templates import render

RUNTIMES = {
    "v4": "tpu-ubuntu2204-base", "v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e",
}  # fmt: skip
"""The runtime version of Google's machine images for JAX, by chip."""
_RECIPE_FILE = "/tmp/mplug2-recipe.py"  # on the hosts
_NAME = r"[a-z0-9]([-a-z0-9.:]{0,61}[a-z0-9])?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuVmOptions:
    """Options of the Cloud TPU service."""

    image: str
    zone: str
    project: str | None = None  # None: gcloud's default
    runtime: str | None = None  # None: the chip's in RUNTIMES
    spot: bool = False
    reserved: bool = False
    mount: str | None = None  # gs:// URL of a bucket or a folder in it


def render_tpu_vm(job: Job, options: TpuVmOptions) -> Submission:
    """Render the script.

    Raises:
        UserError: the service does not offer the topology, the work directory is not in a bucket, or a name is invalid.
    """
    check_tpu(job, "tpu-vm")
    accelerator_type = job.topology.accelerator_type
    if not accelerator_type:
        raise UserError(
            f"--topology {job.topology.name}: queued resources have no {job.topology.chip.name}; use mplug2 launch "
            f"gke, or one of {', '.join(RUNTIMES)}"
        )
    check_option("--image", options.image, IMAGE, "europe-docker.pkg.dev/project/runs/mplug2:1")
    check_option("--zone", options.zone, _NAME, "us-east5-a")
    check_option("--project", options.project, _NAME, "my-project")
    check_option("--runtime-version", options.runtime, _NAME, "v2-alpha-tpuv5")
    check_google_workdir(job.workdir)
    bucket, slices = parse_mount(options.mount), job.topology.slices
    recipe_path = f"{RECIPES}/{job.recipe.name}" if job.recipe else ""
    registry = options.image.partition("/")[0]
    text = render(
        "tpu_vm.sh.j2",
        name=job.name,
        location=[f"--zone={options.zone}", *([f"--project={options.project}"] if options.project else [])],
        nodes=[f"{job.name}-{i}" for i in range(slices)] if slices > 1 else [job.name],
        request=[
            f"--accelerator-type={accelerator_type}",
            f"--runtime-version={options.runtime or RUNTIMES[job.topology.chip.name]}",
            *([f"--node-count={slices}", f"--node-prefix={job.name}"] if slices > 1 else [f"--node-id={job.name}"]),
            *(["--spot"] if options.spot else []),
            *(["--reserved"] if options.reserved else []),
        ],
        image=options.image, registry=registry if registry.endswith((".pkg.dev", "gcr.io")) else "",
        mount=MOUNT, gcsfuse=_gcsfuse(bucket) if bucket else [],
        docker=[
            *(["--volume", f"{MOUNT}:{MOUNT}:ro"] if bucket else []),
            *(["--volume", f"{_RECIPE_FILE}:{recipe_path}:ro"] if job.recipe else []),
            *(["--env", f"MPLUG2_DATA={job.data_folder}"] if job.data_folder else []),
            options.image,
        ],
        command=job.command(recipe_path), recipe=job.recipe.text if job.recipe else "", recipe_file=_RECIPE_FILE,
        grace_period=job.grace_period, max_restarts=job.max_restarts, user_error=USER_ERROR, preempted=PREEMPTED,
    )  # fmt: skip
    notes = (*describe_input_paths(job.input_paths, (MOUNT,) if bucket else ()), *describe_mount(bucket))
    return Submission(filename=f"{job.name}.sh", text=text, command=("bash",), notes=notes)


def _gcsfuse(bucket: Bucket) -> list[str]:
    """Return the command of a read-only mount, whose metadata never expires."""
    only = [f"--only-dir={bucket.folder}"] if bucket.folder else []
    cached = ["--metadata-cache-ttl-secs=-1", "--kernel-list-cache-ttl-secs=-1"]
    return ["gcsfuse", "-o", "ro,allow_other", "--implicit-dirs", *cached, *only, bucket.name, MOUNT]
