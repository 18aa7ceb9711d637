"""SLURM: an sbatch file with one task per host, which requeues itself."""

import dataclasses

from mplug2_jax.errors import PREEMPTED, USER_ERROR, UserError
from mplug2_jax.launch.job import Job, Submission, check_option, describe_input_paths
from mplug2_jax.launch.templates import render

_WORD = r"[\w.,:@+-]+"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """Options of a cluster; None: the cluster's default."""

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    image: str | None = None  # of Pyxis: registry#image:tag, or a squashfs file


def render_slurm(job: Job, options: SlurmOptions) -> Submission:
    """Render the sbatch file.

    Raises:
        UserError: SLURM does not schedule the machines, or an option is invalid.
    """
    chip, workdir = job.topology.chip, job.workdir
    if chip.platform == "tpu":
        raise UserError(
            f"--topology {job.topology.name}: SLURM has no TPUs; use mplug2 launch gke or tpu-vm, or a number of "
            "GPUs, as in h100:64"
        )
    if "://" in workdir:
        raise UserError(
            f"--workdir {workdir}: expected a folder on a shared file system, as in /shared/runs/{job.name}"
        )
    chips_per_node = min(job.topology.chips_per_slice, chip.chips_per_host)
    if job.topology.chips_per_slice % chips_per_node:
        raise UserError(
            f"--topology {job.topology.name}: expected a multiple of {chips_per_node}, because all nodes are equal, "
            f"as in {chip.name}:{chips_per_node * job.topology.hosts_per_slice}"
        )
    check_option("--partition", options.partition, _WORD, "gpu")
    check_option("--account", options.account, _WORD, "my-project")
    check_option("--time", options.time, r"(\d+-)?\d+(:\d+){0,2}", "12:00:00")
    _check_time(options.time, job.grace_period)
    check_option("--image", options.image, r"[\w.,:@+/#-]+", "registry.example.com#team/mplug2:1")
    parent = workdir.rstrip("/").rpartition("/")[0] or "."
    recipe_path = f"{parent}/{job.name}.recipe.py" if job.recipe else ""
    if ":" in recipe_path:
        raise UserError(f"--workdir {workdir}: expected a path without colons, because the recipe is saved next to it")
    cluster_options = {"partition": options.partition, "account": options.account, "time": options.time}
    gpu = chip.platform == "gpu"
    text = render(
        "slurm.sbatch.j2",
        name=job.name, nodes=job.topology.hosts_per_slice,
        gpus=chips_per_node if gpu else 0, cpus=0 if gpu else chips_per_node,
        options={option: value for option, value in cluster_options.items() if value is not None},
        container=_container_options(options.image, workdir), command=job.command(recipe_path=recipe_path),
        recipe=job.recipe.text if job.recipe else "", recipe_folder=parent, recipe_file=recipe_path,
        grace_period=job.grace_period, max_restarts=job.max_restarts, user_error=USER_ERROR, preempted=PREEMPTED,
    )  # fmt: skip
    return Submission(
        filename=f"{job.name}.sbatch",
        text=text,
        command=("sbatch",),
        notes=describe_input_paths(job, parent if options.image else None),
    )


def _check_time(time: str | None, grace_period: int) -> None:
    """Check that a run has time before SIGTERM, which SLURM may send a minute early. Raises UserError."""
    if time is None:
        return
    days, dash, clock = time.rpartition("-")
    numbers = [int(number) for number in clock.split(":")]
    # SLURM's formats are M, M:S and H:M:S; after days, H, H:M and H:M:S.
    hours, minutes, seconds = (
        [*numbers, 0, 0] if dash else {1: [0, *numbers, 0], 2: [0, *numbers]}.get(len(numbers), numbers)
    )[:3]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total <= grace_period + 60:
        raise UserError(
            f"--time {time} with --grace-period {grace_period}: SIGTERM would come right after the start; expected "
            f"more than {grace_period + 60} seconds"
        )


def _container_options(image: str | None, workdir: str) -> list[str]:
    """Return the options of srun that run the tasks in a container with the work directory's parent mounted."""
    if image is None:
        return []
    parent = workdir.rstrip("/").rpartition("/")[0]
    if not parent.startswith("/") or "," in parent or ":" in parent:
        raise UserError(
            f"--workdir {workdir} with --image: expected an absolute path without commas or colons, as in "
            "/shared/runs/one"
        )
    return [f"--container-image={image}", f"--container-mounts={parent}:{parent}"]
