"""Cloud TPU machines: a script around gcloud's queued resources, which asks again for what is taken away."""

import dataclasses

from mplug2_jax.errors import PREEMPTED, USER_ERROR, UserError
from mplug2_jax.launch.gke import IMAGE
from mplug2_jax.launch.job import MOUNT, RECIPES, Job, Launch, bucket_of, check_option, check_tpu, notes_on
from mplug2_jax.launch.templates import render

RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
"""The software that machines of a chip come with, as Google names it for JAX."""
_RECIPE_FILE = "/tmp/mplug2-recipe.py"  # of the hosts
_NAME = r"[a-z0-9]([-a-z0-9.:]{0,61}[a-z0-9])?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuVmOptions:
    """The image, and where to ask for machines."""

    image: str
    zone: str
    project: str | None = None  # None: gcloud's own
    runtime: str | None = None  # None: the usual one of the chip
    spot: bool = False
    reserved: bool = False


def launch_tpu_vm(job: Job, options: TpuVmOptions) -> Launch:
    """The script.

    Raises:
        UserError: no TPUs, or some that this service does not sell, no bucket, or names that it does not take.
    """
    check_tpu(job, "tpu-vm")
    kind = job.topology.accelerator_type
    if not kind:
        raise UserError(
            f"--topology {job.topology.name}: queued resources have no {job.topology.chip.name}; use mplug2 launch "
            f"gke, or one of {', '.join(RUNTIMES)}"
        )
    check_option("--image", options.image, IMAGE, "europe-docker.pkg.dev/project/runs/mplug2:1")
    check_option("--zone", options.zone, _NAME, "us-east5-a")
    check_option("--project", options.project, _NAME, "my-project")
    check_option("--runtime-version", options.runtime, _NAME, "v2-alpha-tpuv5")
    bucket, slices = bucket_of(job), job.topology.slices
    recipe = f"{RECIPES}/{job.recipe.name}" if job.recipe else ""
    registry = options.image.partition("/")[0]
    text = render(
        "tpu_vm.sh.j2",
        name=job.name,
        where=[f"--zone={options.zone}", *([f"--project={options.project}"] if options.project else [])],
        nodes=[f"{job.name}-{i}" for i in range(slices)] if slices > 1 else [job.name],
        request=[
            f"--accelerator-type={kind}",
            f"--runtime-version={options.runtime or RUNTIMES[job.topology.chip.name]}",
            *([f"--node-count={slices}", f"--node-prefix={job.name}"] if slices > 1 else [f"--node-id={job.name}"]),
            *(["--spot"] if options.spot else []),
            *(["--reserved"] if options.reserved else []),
        ],
        image=options.image,
        registry=registry if registry.endswith((".pkg.dev", "gcr.io")) else "",
        bucket=bucket.name,
        mount=MOUNT,
        volume=f"{MOUNT}:{MOUNT}",
        command=job.command(bucket.workdir, recipe),
        recipe=job.recipe.text if job.recipe else "",
        recipe_file=_RECIPE_FILE,
        recipe_volume=f"{_RECIPE_FILE}:{recipe}:ro",
        grace=job.grace,
        max_restarts=job.max_restarts,
        mistake=USER_ERROR,
        preempted=PREEMPTED,
    )
    return Launch(filename=f"{job.name}.sh", text=text, submit=("bash",), notes=notes_on(job, MOUNT))
