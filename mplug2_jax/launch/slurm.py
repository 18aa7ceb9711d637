"""SLURM: an sbatch file with one task for each host, which queues itself again."""

import dataclasses

from mplug2_jax.errors import PREEMPTED, USER_ERROR, UserError
from mplug2_jax.launch.job import Job, Launch, check_option, notes_on
from mplug2_jax.launch.templates import render

_WORD = r"[\w.,:@+-]+"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What a cluster wants to know besides. None is left to the cluster."""

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    image: str | None = None  # of Pyxis: registry#image:tag, or a squashfs file


def launch_slurm(job: Job, options: SlurmOptions) -> Launch:
    """The sbatch file.

    Raises:
        UserError: machines that SLURM does not schedule, or options that it would misread.
    """
    chip, workdir = job.topology.chip, job.workdir
    if chip.platform == "tpu":
        raise UserError(
            f"--topology {job.topology.name}: SLURM has no TPUs; use mplug2 launch gke or tpu-vm, or a number of "
            "GPUs, as in h100:64"
        )
    if "://" in workdir:
        raise UserError(f"--workdir {workdir}: expected a folder that all nodes share, as in /shared/runs/{job.name}")
    each = min(job.topology.chips_per_slice, chip.chips_per_host)
    if job.topology.chips_per_slice % each:
        raise UserError(
            f"--topology {job.topology.name}: all nodes are alike; expected a multiple of {each}, as in "
            f"{chip.name}:{each * job.topology.hosts_per_slice}"
        )
    check_option("--partition", options.partition, _WORD, "gpu")
    check_option("--account", options.account, _WORD, "my-project")
    check_option("--time", options.time, r"(\d+-)?\d+(:\d+){0,2}", "12:00:00")
    _check_time(options.time, job.grace)
    check_option("--image", options.image, r"[\w.,:@+/#-]+", "registry.example.com#team/mplug2:1")
    parent = workdir.rstrip("/").rpartition("/")[0] or "."
    recipe = f"{parent}/{job.name}.recipe.py" if job.recipe else ""
    if ":" in recipe:
        raise UserError(f"--workdir {workdir}: a recipe of one's own goes beside it, and its path may have no colon")
    names = {"partition": options.partition, "account": options.account, "time": options.time}
    gpu = chip.platform == "gpu"
    text = render(
        "slurm.sbatch.j2",
        name=job.name,
        nodes=job.topology.hosts_per_slice,
        gpus=each if gpu else 0,
        cpus=0 if gpu else each,
        options={option: value for option, value in names.items() if value is not None},
        grace=job.grace,
        max_restarts=job.max_restarts,
        container=_container(options.image, workdir),
        command=job.command(recipe=recipe),
        recipe=job.recipe.text if job.recipe else "",
        recipe_folder=parent,
        recipe_file=recipe,
        mistake=USER_ERROR,
        preempted=PREEMPTED,
    )
    return Launch(
        filename=f"{job.name}.sbatch",
        text=text,
        submit=("sbatch",),
        notes=notes_on(job, parent if options.image else None),
    )


def _check_time(time: str | None, grace: int) -> None:
    """Checks that a run has time before it is told to end, which SLURM may do a minute early. Raises UserError."""
    if time is None:
        return
    days, dash, rest = time.rpartition("-")
    numbers = [int(number) for number in rest.split(":")]
    # SLURM's forms are M, M:S and H:M:S; after days, H, H:M and H:M:S.
    hours, minutes, seconds = (
        [*numbers, 0, 0] if dash else {1: [0, *numbers, 0], 2: [0, *numbers]}.get(len(numbers), numbers)
    )[:3]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total <= grace + 60:
        raise UserError(
            f"--time {time} with --grace {grace}: the run would be told to end as soon as it starts; give it more than "
            f"{grace + 60} seconds"
        )


def _container(image: str | None, workdir: str) -> list[str]:
    """The options of srun that put the tasks into a container, with the work directory's parent in it."""
    if image is None:
        return []
    parent = workdir.rstrip("/").rpartition("/")[0]
    if not parent.startswith("/") or "," in parent or ":" in parent:
        raise UserError(
            f"--workdir {workdir} with --image: expected a whole path without commas and colons, as in /shared/runs/one"
        )
    return [f"--container-image={image}", f"--container-mounts={parent}:{parent}"]
