"""A run and the machines it is for, checked before anybody waits for them; and what a target makes of both."""

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
"""Where a bucket is a folder, in containers."""
RECIPES = "/recipes"
"""Where the recipe that a job carries is, in containers."""
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_BUCKET = re.compile(r"gs://(?P<bucket>[a-z0-9][-._a-z0-9]{1,220}[a-z0-9])/(?P<path>[^/].*)", re.DOTALL)


_MAX_RECIPE = 2**16


class Recipe(NamedTuple):
    """A recipe file that goes with a job."""

    name: str
    text: str
    arg: str  # ":ARG", or nothing


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
    recipe: Recipe | None = None  # that is none of the package's
    reads: Mapping[str, str] = dataclasses.field(default_factory=dict)  # paths, and the fields that name them

    def command(self, workdir: str = "", recipe: str = "") -> list[str]:
        """The words of the training command; ``recipe`` is where the job finds the file that it carries."""
        config = f"{recipe}{self.recipe.arg}" if self.recipe else self.config
        return ["mplug2", "train", "--config", config, "--workdir", workdir or self.workdir, *self.overrides]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """What a target makes of a job: a file, how it is submitted, and other ways to do the same."""

    filename: str
    text: str
    submit: tuple[str, ...]  # the words before the file's name
    others: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = ()  # what they are, and their commands
    notes: tuple[str, ...] = ()  # on what may be missing where it runs


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

    topology = parse_topology(plan.topology, plan.slices)
    check_range("--grace", grace, 1, 3600)
    check_range("--max-restarts", max_restarts, 0)
    run = build(RunConfig, load_recipe(plan.config, plan.overrides))
    config, recipe = bundle_recipe(plan.config)
    mesh = run.mesh
    replicas = abstract_mesh(mesh, topology.devices).shape["replica"]
    if replicas % topology.slices:
        raise UserError(
            f"config.mesh.replica={replicas} on {topology}: only replicas may cross slices; add "
            f"--config.mesh.replica={topology.slices}"
        )
    return Job(
        config=config,
        recipe=recipe,
        reads=read_paths(run),
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


def bundle_recipe(spec: str) -> tuple[str, Recipe | None]:
    """Return a recipe as a job names it, and the file if it is none of the package's, which the job must bring.

    Raises:
        UserError: no such recipe, one that is too large, or one that imports files beside it.
    """
    name, colon, arg = spec.partition(":")
    path = find_recipe(name).resolve()
    if path in {shipped.resolve() for shipped in shipped_recipes().values()}:
        return f"{path.stem}{colon}{arg}", None
    text = path.read_text(encoding="utf-8")
    if len(text.encode()) > _MAX_RECIPE:
        raise UserError(f"--config {spec}: a job carries recipes of up to {_MAX_RECIPE >> 10} KiB; make it shorter")
    for module in _imported(text):
        beside = next((each for each in (path.parent, Path.cwd()) if _is_module(each, module)), None)
        if beside is not None:
            raise UserError(
                f"--config {spec} imports {module} of {beside}, which the job would not have: put it into the recipe"
            )
    return spec, Recipe(re.sub(r"[^\w.-]", "-", path.name), text, f"{colon}{arg}")


def _imported(text: str) -> set[str]:
    """The packages that a file of Python imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found - {"configs", "data_pipelines", "mplug2_jax"}


def _is_module(folder: Path, name: str) -> bool:
    return (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()


def read_paths(config: RunConfig) -> dict[str, str]:
    """Return all that a run reads besides its work directory: the first field that names each path, by the path."""
    named = [("config.tokenizer.path", config.tokenizer.path), ("config.init_from", config.init_from)]
    data = [(f"config.streams.{name}.data", stream.data) for name, stream in config.streams.items()]
    for name, evaluation in config.evaluations.items():
        data.append((f"config.evaluations.{name}.data", evaluation.data))
        named.append((f"config.evaluations.{name}.answers", evaluation.answers))
    for where, each in data:
        for name, source in each.sources.items():
            named += [(f"{where}.sources.{name}.{field}", getattr(source, field)) for field in ("path", "media")]
    found: dict[str, str] = {}
    for field, path in named:
        if path:
            found.setdefault(path, field)
    return found


def notes_on(job: Job, mounted: str | None) -> tuple[str, ...]:
    """Return a sentence about each path that the job reads and that it may lack.

    Args:
        job: the job.
        mounted: the folder of this or another machine that its containers have; None: it has this machine's paths.
    """
    notes = []
    for path, field in job.reads.items():
        if "://" in path or (mounted and Path(path).is_relative_to(mounted)):
            why = "whether it is there, and may be read, cannot be known from here"
        elif mounted:
            why = f"the containers have {mounted} and what the image holds, nothing else; put it there, or give a URL"
        elif not _exists(path):
            why = "it is not here; the nodes must have it"
        else:
            why = "it is here; whether the nodes see it, too, cannot be known from here"
        notes.append(f"{field}={path}: {why}")
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
