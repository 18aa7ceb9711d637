"""SLURM: an sbatch file with one task per host, which requeues itself; or one with an array of data workers."""

import dataclasses
from pathlib import Path

from data_pipelines.storage.file_system import SCHEMES
from data_pipelines.storage.paths import to_path
from mplug2_jax.errors import PREEMPTED, USER_ERROR, UserError
from mplug2_jax.launch.data_job import DataJob
from mplug2_jax.launch.job import RECIPES, Job, Submission, check_option, check_workdir, describe_input_paths
from mplug2_jax.launch.templates import quote_command, render

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
    chips_per_node = min(job.topology.chips_per_slice, chip.chips_per_host)
    if job.topology.chips_per_slice % chips_per_node:
        raise UserError(
            f"--topology {job.topology.name}: expected a multiple of {chips_per_node}, because all nodes are equal, "
            f"as in {chip.name}:{chips_per_node * job.topology.hosts_per_slice}"
        )
    cluster_options = _check_cluster_options(options)
    _check_time(options.time, job.grace_period)
    check_option("--image", options.image, r"[\w.,:@+/#-]+", "registry.example.com#team/mplug2:1")
    # The folder of the work directory, if it is not in a bucket: all nodes have it.
    shared = None if check_workdir(workdir) else to_path(workdir).parent
    recipe_file = str((shared or Path()) / f"{job.name}.recipe.py") if job.recipe else ""
    if ":" in recipe_file:
        raise UserError(f"--workdir {workdir}: expected a path without colons, because the recipe is saved next to it")
    recipe_mount = f"{RECIPES}/{job.name}.py" if job.recipe and options.image and not shared else ""
    gpu = chip.platform == "gpu"
    text = render(
        "slurm.sbatch.j2",
        name=job.name, nodes=job.topology.hosts_per_slice,
        gpus=chips_per_node if gpu else 0, cpus=0 if gpu else chips_per_node,
        options=cluster_options,
        container=_container_options(options.image, workdir, shared), recipe_mount=recipe_mount,
        command=job.command(recipe_mount or recipe_file), data_folder=job.data_folder,
        recipe=job.recipe.text if job.recipe else "", recipe_folder=shared or "", recipe_file=recipe_file,
        grace_period=job.grace_period, max_restarts=job.max_restarts, user_error=USER_ERROR, preempted=PREEMPTED,
    )  # fmt: skip
    return Submission(
        filename=f"{job.name}.sbatch",
        text=text,
        command=("sbatch",),
        notes=(
            *describe_input_paths(job.input_paths, None if not options.image else [str(shared)] if shared else []),
            *([] if shared else [_describe_bucket(workdir)]),
        ),
    )


def render_slurm_array(job: DataJob, options: SlurmOptions) -> Submission:
    """Render the sbatch file of an array of data workers.

    Raises:
        UserError: an option is invalid, or not for data workers.
    """
    cluster_options = _check_cluster_options(options)
    if options.image is not None:
        raise UserError(f"--image {options.image}: data workers run in the environment of sbatch; remove it")
    text = render(
        "data.sbatch.j2", name=job.name, workers=job.workers, cpus=job.cpus, options=cluster_options,
        command=job.command, data_folder=job.data_folder, max_restarts=job.max_restarts, user_error=USER_ERROR,
    )  # fmt: skip
    join = quote_command(job.join_command)
    return Submission(
        filename=f"{job.name}.sbatch",
        text=text,
        command=("sbatch",),
        notes=(*describe_input_paths(job.input_paths, None), f"{job.out}: the nodes must share it"),
        alternatives=(("when all workers have ended, join what they did", (tuple(job.join_command),)),
                      ("or let SLURM do it", (("sbatch", "--dependency=afterany:JOB", "--wrap", join),))),
    )  # fmt: skip


def _check_cluster_options(options: SlurmOptions) -> dict[str, str]:
    """Return the options of a cluster that are set. Raises UserError."""
    check_option("--partition", options.partition, _WORD, "gpu")
    check_option("--account", options.account, _WORD, "my-project")
    check_option("--time", options.time, r"(\d+-)?\d+(:\d+){0,2}", "12:00:00")
    values = {"partition": options.partition, "account": options.account, "time": options.time}
    return {option: value for option, value in values.items() if value is not None}


def _describe_bucket(workdir: str) -> str:
    package, remedy = SCHEMES[workdir.partition("://")[0]]
    return (
        f"--workdir {workdir}: the nodes need a connection to it, credentials that can write it, and {package} "
        f"({remedy})"
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


def _container_options(image: str | None, workdir: str, shared: Path | None) -> list[str]:
    """Return the options of srun that run the tasks in a container, with the shared folder mounted, if any."""
    if image is None:
        return []
    options = [f"--container-image={image}"]
    if shared is None:
        return options
    folder = str(shared)
    if not folder.startswith("/") or folder == "/" or "," in folder or ":" in folder:
        raise UserError(
            f"--workdir {workdir} with --image: expected an absolute path without commas or colons, as in "
            "/shared/runs/one, or gs://BUCKET/FOLDER"
        )
    return [*options, f"--container-mounts={folder}:{folder}"]
