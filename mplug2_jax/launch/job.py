"""A run and the machines it is for, checked before anybody waits for them; and what a target makes of both."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from mplug2_jax.config import build, find_recipe, load_recipe, recipe_folder
from mplug2_jax.errors import UserError, check_range
from mplug2_jax.parallel.chips import Topology, parse_topology
from mplug2_jax.planning.plan_file import PlanFile, read_plan

MOUNT = "/gcs"
"""Where a bucket is a folder, in containers."""
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_BUCKET = re.compile(r"gs://(?P<bucket>[a-z0-9][-._a-z0-9]{1,220}[a-z0-9])/(?P<path>[^/].*)", re.DOTALL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run, where it keeps everything, and the machines that it is for."""

    config: str
    overrides: tuple[str, ...]
    topology: Topology
    workdir: str
    name: str
    grace: int = 120  # seconds to save and leave, once told to end
    max_restarts: int = 100

    def command(self, workdir: str = "") -> list[str]:
        """The words of the training command."""
        return ["mplug2", "train", "--config", self.config, "--workdir", workdir or self.workdir, *self.overrides]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """What a target makes of a job: a file, how it is submitted, and other ways to do the same."""

    filename: str
    text: str
    submit: tuple[str, ...]  # the words before the file's name
    others: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = ()  # what they are, and their commands


def plan_of(
    *, plan: Path | None, config: str | None, overrides: Sequence[str], topology: str | None, slices: int | None
) -> PlanFile:
    """What to run on which machines: from a file, with further overrides, or from the options that say the same.

    Raises:
        UserError: neither or both.
    """
    if plan is None:
        for option, value in (("--config", config), ("--topology", topology)):
            if value is None:
                raise UserError(f"{option} is missing; give --config and --topology, or --plan plan.json for both")
        assert config is not None
        assert topology is not None
        return PlanFile(
            config=config, overrides=tuple(overrides), topology=topology, slices=1 if slices is None else slices
        )
    for option, found in (("--config", config), ("--topology", topology), ("--slices", slices)):
        if found is not None:
            raise UserError(f"{option} {found} with --plan {plan}: the plan says it already; give one or the other")
    read = read_plan(plan)
    return dataclasses.replace(read, overrides=(*read.overrides, *overrides))


def make_job(plan: PlanFile, *, workdir: str, name: str | None, grace: int, max_restarts: int) -> Job:
    """A job whose config, mesh and names are right.

    Raises:
        UserError: a config that would fail, a mesh that does not fit the topology, or a name that no target takes.
    """
    # Here, so that --help need not wait for JAX.
    from mplug2_jax.parallel.mesh import abstract_mesh
    from mplug2_jax.training.config import RunConfig

    topology = parse_topology(plan.topology, plan.slices)
    check_range("--grace", grace, 1, 3600)
    check_range("--max-restarts", max_restarts, 0)
    mesh = build(RunConfig, load_recipe(plan.config, plan.overrides)).mesh
    replicas = abstract_mesh(mesh, topology.devices).shape["replica"]
    if replicas % topology.slices:
        raise UserError(
            f"config.mesh.replica={replicas} on {topology}: only replicas may cross slices; add "
            f"--config.mesh.replica={topology.slices}"
        )
    return Job(
        config=plan.config,
        overrides=tuple(plan.overrides),
        topology=topology,
        workdir=workdir,
        name=_name(name, workdir),
        grace=grace,
        max_restarts=max_restarts,
    )


def _name(name: str | None, workdir: str) -> str:
    """The name, or one made of the work directory's last part."""
    made = re.sub(r"[^a-z0-9]+", "-", workdir.rstrip("/").rpartition("/")[2].lower()).strip("-")[:40].strip("-")
    found = made if name is None else name
    if not _NAME.fullmatch(found):
        raise UserError(
            f"--name {found!r}: expected at most 40 of a-z, 0-9 and -, beginning with a letter, as in --name my-run"
        )
    return found


def check_option(option: str, value: str | None, pattern: str, like: str) -> None:
    """Checks an option's value, if it was given, against what the target takes. Raises UserError."""
    if value is not None and not re.fullmatch(pattern, value):
        raise UserError(f"{option} {value!r}: expected something like {option} {like}")


def check_tpu(job: Job, target: str) -> None:
    """Raises UserError for other machines than TPUs."""
    if job.topology.chip.platform != "tpu":
        raise UserError(
            f"--topology {job.topology.name}: {target} starts runs on TPUs only, as in v5p:8x8x8; for "
            f"{job.topology.chip.name} use mplug2 launch slurm"
        )


def check_shipped(job: Job) -> str:
    """The recipe as a container has it. Raises UserError for one that is a file of this machine only."""
    name, _, arg = job.config.partition(":")
    path = find_recipe(name).resolve()
    if path.parent != recipe_folder().resolve():
        raise UserError(
            f"--config {job.config}: the containers do not have this file; put it into configs/, build the image, and "
            f"give its name, --config {path.stem}"
        )
    return f"{path.stem}:{arg}" if arg else path.stem


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A work directory in a bucket."""

    name: str
    path: str

    @property
    def workdir(self) -> str:
        """Where containers find it."""
        return f"{MOUNT}/{self.path}"


def bucket_of(job: Job) -> Bucket:
    """The bucket of a work directory. Raises UserError where it is in none."""
    match = _BUCKET.fullmatch(job.workdir)
    if not match or ".." in match["path"].split("/"):
        raise UserError(
            f"--workdir {job.workdir}: expected gs://BUCKET/FOLDER, as the machines' own disks are lost with them"
        )
    return Bucket(match["bucket"], match["path"].rstrip("/"))
