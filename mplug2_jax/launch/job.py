"""Jobs: a run and its machines, validated before submission, and the files that schedulers take."""

import ast
import contextlib
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data_pipelines.errors import DataError
from data_pipelines.sources.files import find_files
from mplug2_jax.config import build, find_recipe, load_recipe, shipped_recipes
from mplug2_jax.errors import UserError, check_range
from mplug2_jax.parallel.accelerators import Topology, parse_topology
from mplug2_jax.planning.plan_file import PlanFile, read_plan
from mplug2_jax.training.config import RunConfig

MOUNT = "/gcs"
"""Mount point of the bucket, in containers."""
RECIPES = "/recipes"
"""Mount point of a bundled recipe, in containers."""
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_BUCKET = re.compile(r"gs://(?P<bucket>[a-z0-9][-._a-z0-9]{1,220}[a-z0-9])/(?P<path>[^/].*)", re.DOTALL)


_MAX_RECIPE_BYTES = 2**16


class BundledRecipe(NamedTuple):
    """A recipe file that is bundled with a job."""

    name: str
    text: str
    arg: str  # ":ARG", or empty


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A run, its work directory, and its machines."""

    config: str
    overrides: tuple[str, ...]
    topology: Topology
    workdir: str
    name: str
    grace_period: int = 120  # seconds from SIGTERM to SIGKILL, to save and exit
    max_restarts: int = 100
    recipe: BundledRecipe | None = None  # None: a shipped one
    input_paths: Mapping[str, str] = dataclasses.field(default_factory=dict)  # the config field by path

    def command(self, workdir: str = "", recipe_path: str = "") -> list[str]:
        """Return the training command, with the paths of the work directory and a bundled recipe on the machines."""
        config = f"{recipe_path}{self.recipe.arg}" if self.recipe else self.config
        return ["mplug2", "train", "--config", config, "--workdir", workdir or self.workdir, *self.overrides]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submission:
    """A scheduler's file for a job, and the command that submits it."""

    filename: str
    text: str
    command: tuple[str, ...]  # to be followed by the file's name
    alternatives: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = ()  # titles, and commands
    notes: tuple[str, ...] = ()  # about inputs that may be missing on the machines


def resolve_plan(
    *, plan: Path | None, config: str | None, overrides: Sequence[str], topology: str | None, slices: int | None
) -> PlanFile:
    """Return what to run on which topology: from a plan file plus overrides, or from the options.

    Raises:
        UserError: neither the plan nor the options are given, or both.
    """
    if plan is None:
        if config is None or topology is None:
            option = "--config" if config is None else "--topology"
            raise UserError(f"{option} is missing; give --config and --topology, or --plan plan.json for both")
        return PlanFile(
            config=config, overrides=tuple(overrides), topology=topology, slices=1 if slices is None else slices
        )
    for option, setting in (("--config", config), ("--topology", topology), ("--slices", slices)):
        if setting is not None:
            raise UserError(f"{option} {setting} with --plan {plan}: the plan already sets it; give one or the other")
    plan_file = read_plan(plan)
    return dataclasses.replace(plan_file, overrides=(*plan_file.overrides, *overrides))


def make_job(plan: PlanFile, *, workdir: str, name: str | None, grace_period: int, max_restarts: int) -> Job:
    """Validate a config, its mesh and the name of its job.

    Raises:
        UserError: the config is invalid, the mesh does not fit the topology, or schedulers do not accept the name.
    """
    # Imported here, so that --help does not import JAX.
    from mplug2_jax.parallel.mesh import abstract_mesh

    topology = parse_topology(plan.topology, plan.slices)
    check_range("--grace-period", grace_period, 1, 3600)
    check_range("--max-restarts", max_restarts, 0)
    run_config = build(RunConfig, load_recipe(plan.config, plan.overrides))
    config, recipe = bundle_recipe(plan.config)
    replicas = abstract_mesh(run_config.mesh, topology.devices).shape["replica"]
    if replicas % topology.slices:
        raise UserError(
            f"config.mesh.replica={replicas} on {topology}: only the replica axis may cross slices; add "
            f"--config.mesh.replica={topology.slices}"
        )
    return Job(
        config=config, recipe=recipe, input_paths=find_input_paths(run_config), overrides=tuple(plan.overrides),
        topology=topology, workdir=workdir, name=_job_name(name, workdir), grace_period=grace_period,
        max_restarts=max_restarts,
    )  # fmt: skip


def _job_name(name: str | None, workdir: str) -> str:
    """Return the given name, or one derived from the last part of the work directory."""
    derived = re.sub(r"[^a-z0-9]+", "-", workdir.rstrip("/").rpartition("/")[2].lower()).strip("-")[:40].strip("-")
    job_name = derived if name is None else name
    if not _NAME.fullmatch(job_name):
        raise UserError(
            f"--name {job_name!r}: expected at most 40 of a-z, 0-9 and -, beginning with a letter, as in --name my-run"
        )
    return job_name


def check_option(option: str, value: str | None, pattern: str, example: str) -> None:
    """Check an option's value, if given, against a pattern. Raises UserError."""
    if value is not None and not re.fullmatch(pattern, value):
        raise UserError(f"{option} {value!r}: expected something like {option} {example}")


def check_tpu(job: Job, target: str) -> None:
    """Check that a job is for TPUs. Raises UserError."""
    if job.topology.chip.platform != "tpu":
        raise UserError(
            f"--topology {job.topology.name}: {target} starts runs on TPUs only, as in v5p:8x8x8; for "
            f"{job.topology.chip.name} use mplug2 launch slurm"
        )


def bundle_recipe(spec: str) -> tuple[str, BundledRecipe | None]:
    """Return a recipe as jobs name it, and its file to bundle with the job if it is no shipped one.

    Raises:
        UserError: the recipe does not exist, is too large, or imports files next to it.
    """
    name, colon, arg = spec.partition(":")
    path = find_recipe(name).resolve()
    if path in {shipped.resolve() for shipped in shipped_recipes().values()}:
        return f"{path.stem}{colon}{arg}", None
    text = path.read_text(encoding="utf-8")
    if len(text.encode()) > _MAX_RECIPE_BYTES:
        raise UserError(f"--config {spec}: the limit for recipes of jobs is {_MAX_RECIPE_BYTES >> 10} KiB; shorten it")
    for module in _imported_packages(text):
        folder = next((folder for folder in (path.parent, Path.cwd()) if _has_module(folder, module)), None)
        if folder is not None:
            raise UserError(
                f"--config {spec} imports {module} from {folder}, which the job does not have: move it into the recipe"
            )
    return spec, BundledRecipe(re.sub(r"[^\w.-]", "-", path.name), text, f"{colon}{arg}")


def _imported_packages(text: str) -> set[str]:
    """Return the top-level packages that Python source imports, other than this project's."""
    packages: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            packages.add(node.module.partition(".")[0])
    return packages - {"configs", "data_pipelines", "mplug2_jax"}


def _has_module(folder: Path, name: str) -> bool:
    return (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()


def find_input_paths(config: RunConfig) -> dict[str, str]:
    """Return the paths that a run reads outside its work directory, each with the first config field that names it."""
    paths = [("config.tokenizer.path", config.tokenizer.path), ("config.init_from", config.init_from)]
    data = [(f"config.streams.{name}.data", stream.data) for name, stream in config.streams.items()]
    for name, evaluation in config.evaluations.items():
        data.append((f"config.evaluations.{name}.data", evaluation.data))
        paths.append((f"config.evaluations.{name}.answers_file", evaluation.answers_file))
    for where, data_config in data:
        for name, source in data_config.sources.items():
            paths += [(f"{where}.sources.{name}.{field}", getattr(source, field)) for field in ("path", "media")]
    fields: dict[str, str] = {}
    for field, path in paths:
        if path:
            fields.setdefault(path, field)
    return fields


def describe_input_paths(job: Job, mounted: str | None) -> tuple[str, ...]:
    """Return a note about each path that the job reads and that may be missing on its machines.

    Args:
        job: the job.
        mounted: the folder that is mounted in the containers; None: the job runs with the paths of this machine.
    """
    notes = []
    for path, field in job.input_paths.items():
        if "://" in path or (mounted and Path(path).is_relative_to(mounted)):
            note = "not checked: it is not visible from this machine"
        elif mounted:
            note = f"not in the containers, which have only {mounted} and the image; move it there, or use a URL"
        elif not _exists(path):
            note = "missing on this machine; the nodes must have it"
        else:
            note = "found on this machine; the nodes must have it, too"
        notes.append(f"{field}={path}: {note}")
    return tuple(notes)


def _exists(path: str) -> bool:
    """Return whether a file, a folder, or all files of a pattern are on this machine."""
    with contextlib.suppress(DataError):
        return Path(path).exists() or bool(find_files(path, ""))
    return False


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A work directory in a bucket."""

    name: str
    path: str

    @property
    def workdir(self) -> str:
        """Return its path in containers."""
        return f"{MOUNT}/{self.path}"


def parse_bucket(job: Job) -> Bucket:
    """Return the bucket of a job's work directory. Raises UserError if it is not in one."""
    match = _BUCKET.fullmatch(job.workdir)
    if not match or ".." in match["path"].split("/"):
        raise UserError(
            f"--workdir {job.workdir}: expected gs://BUCKET/FOLDER, because the machines' disks are deleted with them"
        )
    return Bucket(match["bucket"], match["path"].rstrip("/"))
