"""Jobs: a run and its machines, validated before submission, and the files that schedulers take."""

import ast
import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data_pipelines.errors import DataError
from data_pipelines.sources.files import find_files
from data_pipelines.storage.paths import RemotePath, to_path
from mplug2_jax.config import find_recipe, shipped_recipes
from mplug2_jax.errors import UserError, check_range
from mplug2_jax.parallel.accelerators import Topology, parse_topology
from mplug2_jax.planning.plan_file import PlanFile, extend_plan
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.durations import load_run_config

GRACE_PERIOD = 120
"""Seconds from SIGTERM to SIGKILL, by default."""
MOUNT = "/gcs"
"""Mount point of a bucket, in containers."""
RECIPES = "/recipes"
"""Mount point of a bundled recipe, in containers."""
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_BUCKET = re.compile(r"[a-z0-9]([-_.a-z0-9]*[a-z0-9])?")
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
    grace_period: int = GRACE_PERIOD  # seconds from SIGTERM to SIGKILL, to save and exit
    max_restarts: int = 100
    recipe: BundledRecipe | None = None  # None: a shipped one
    input_paths: Mapping[str, str] = dataclasses.field(default_factory=dict)  # the config field by path
    data_folder: str = ""  # $MPLUG2_DATA, if inputs are in it

    def command(self, recipe_path: str = "") -> list[str]:
        """Return the training command, with the path of a bundled recipe on the machines."""
        config = f"{recipe_path}{self.recipe.arg}" if self.recipe else self.config
        return ["mplug2", "train", "--config", config, "--workdir", self.workdir, *self.overrides]


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
    return extend_plan(plan, overrides, {"--config": config, "--topology": topology, "--slices": slices})


def make_job(plan: PlanFile, *, workdir: str, name: str | None, grace_period: int | None, max_restarts: int) -> Job:
    """Validate a config, its mesh and the name of its job. ``grace_period`` None is the default.

    Raises:
        UserError: the config is invalid, the mesh does not fit the topology, or schedulers do not accept the name.
    """
    # Imported here, so that --help does not import JAX.
    from mplug2_jax.parallel.mesh import abstract_mesh

    topology = parse_topology(plan.topology, plan.slices)
    grace_period = GRACE_PERIOD if grace_period is None else grace_period
    check_range("--grace-period", grace_period, 1, 3600)
    check_range("--max-restarts", max_restarts, 0)
    run_config = load_run_config(plan.config, plan.overrides)
    config, recipe = bundle_recipe(plan.config)
    replicas = abstract_mesh(run_config.mesh, topology.devices).shape["replica"]
    if replicas % topology.slices:
        raise UserError(
            f"config.mesh.replica={replicas} on {topology}: only the replica axis may cross slices; add "
            f"--config.mesh.replica={topology.slices}"
        )
    input_paths, data_folder = find_input_paths(run_config), os.environ.get("MPLUG2_DATA", "")
    return Job(
        config=config, recipe=recipe, input_paths=input_paths, overrides=tuple(plan.overrides), topology=topology,
        workdir=workdir, name=make_job_name(name, workdir), grace_period=grace_period, max_restarts=max_restarts,
        data_folder=data_folder if any(path.startswith(data_folder) for path in input_paths) else "",
    )  # fmt: skip


def make_job_name(name: str | None, folder: str) -> str:
    """Return the given name, or one derived from the last part of a folder. Raises UserError for an invalid one."""
    derived = re.sub(r"[^a-z0-9]+", "-", folder.rstrip("/").rpartition("/")[2].lower()).strip("-")[:40].strip("-")
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


def describe_input_paths(input_paths: Mapping[str, str], mounted: Sequence[str] | None) -> tuple[str, ...]:
    """Return a note about each path that a job reads and that may be missing on its machines.

    Args:
        input_paths: what names each path.
        mounted: the folders that are mounted in the containers; None: the job runs with the paths of this machine.
    """
    notes = []
    for path, field in input_paths.items():
        if "://" in path or any(Path(path).is_relative_to(folder) for folder in mounted or ()):
            note = "not checked here; the machines must be able to read it"
        elif mounted is not None:
            only = " and ".join([*mounted, "the image"])
            note = f"not in the containers, which have only {only}; move it to a bucket, and give its gs:// path"
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


class Bucket(NamedTuple):
    """A bucket, and a folder in it; empty: all of it."""

    name: str
    folder: str


def parse_bucket(option: str, value: str) -> Bucket | None:
    """Return the bucket of a URL; None for a path on a disk.

    The package of the scheme need not be installed, because this machine only passes the URL on.

    Raises:
        UserError: a scheme that runs cannot write, or a name that no bucket can have.
    """
    try:
        path = to_path(value, installed=False)
    except DataError as error:
        raise UserError(f"{option} {error}") from error
    if not isinstance(path, RemotePath):
        return None
    name, _, folder = value.partition("://")[2].partition("/")
    longest = 222 if "." in name else 63  # dots separate parts, as in the name of a host
    if not 3 <= len(name) <= longest:
        raise UserError(f"{option} {value}: names of buckets have 3 to {longest} characters, {name!r} has {len(name)}")
    if not _BUCKET.fullmatch(name):
        raise UserError(
            f"{option} {value}: names of buckets consist of a-z, 0-9, '-', '_' and '.', and begin and end with a "
            f"letter or digit, unlike {name!r}"
        )
    return Bucket(name, folder.strip("/"))


def check_workdir(workdir: str) -> Bucket | None:
    """Check a work directory; return its bucket, or None for a folder on a disk. Raises UserError."""
    bucket = parse_bucket("--workdir", workdir)
    if bucket and not bucket.folder:
        raise UserError(f"--workdir {workdir}: expected a folder in the bucket, as in {workdir.rstrip('/')}/runs/one")
    return bucket


def check_google_workdir(workdir: str) -> None:
    """Check that a work directory is in a bucket of Google Cloud. Raises UserError."""
    if check_workdir(workdir) is None or not workdir.startswith("gs://"):
        raise UserError(
            f"--workdir {workdir}: expected gs://BUCKET/FOLDER, which outlives the machines and which their service "
            "account can write"
        )


def parse_mount(value: str | None) -> Bucket | None:
    """Return the bucket to mount at :data:`MOUNT`, if any. Raises UserError."""
    if value is None:
        return None
    bucket = parse_bucket("--mount", value)
    if bucket is None or not value.startswith("gs://") or "," in value:  # commas separate mount options
        raise UserError(f"--mount {value}: expected gs://BUCKET or gs://BUCKET/FOLDER, without commas")
    return bucket


def describe_mount(bucket: Bucket | None) -> tuple[str, ...]:
    """Return a note that says where the files of a mounted bucket are, if any is."""
    if bucket is None:
        return ()
    url = f"gs://{'/'.join(filter(None, bucket))}"
    return (f"{url}/FILE is {MOUNT}/FILE on the machines, read-only; changes during the run are not seen",)
