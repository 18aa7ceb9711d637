"""``mplug2 tasks``: list the recipes of downstream tasks, and the data that they need."""

import argparse
import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mplug2_jax.cli.common import add_command, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mplug2_jax.training.config import RunConfig


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "tasks", run,
        summary="List the downstream tasks, and whether their data is present",
        details="Shows the parts of the model and the number of parameters of each task. Data is searched in "
        "$MPLUG2_DATA, or ./data. With a name: which data the task needs, where it comes from, and what is missing.",
        example="mplug2 tasks msrvtt_qa",
    )  # fmt: skip
    parser.add_argument("name", nargs="?", help="a task, to print its details")
    parser.add_argument("--size", default="large", help="model size (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the table, or the details of a task."""
    from mplug2_jax.config import shipped_recipes
    from mplug2_jax.errors import UserError, did_you_mean
    from mplug2_jax.recipes.base import data_folder

    recipes = {name: path for name, path in shipped_recipes().items() if path.parent.name == "tasks"}
    if args.name is not None:
        if args.name not in recipes:
            raise UserError(f"task '{args.name}' is unknown: {did_you_mean(args.name, recipes)}")
        print("\n".join(_details(args.name, recipes[args.name], args.size)))
        return 0
    rows = []
    for name, path in sorted(recipes.items()):
        config, parameters = _read(name, args.size)
        exist = _path_existence(config).values()
        here = "yes" if all(exist) else f"{sum(exist)} of {len(exist)}" if any(exist) else "no"
        title = _docstring(path).partition("\n")[0].partition(":")[0]
        rows.append((name, title, ", ".join(config.parts()), f"{parameters / 1e6:,.0f}", here))
    print(table(rows, ("task", "data set", "parts", "million", "data here"), right=(3,)))
    print(f"\ndata folder: {data_folder().absolute()}; mplug2 tasks NAME prints what a task needs")
    return 0


def _details(name: str, path: Path, size: str) -> "Iterator[str]":
    config, parameters = _read(name, size)
    yield _docstring(path)
    yield ""
    yield f"model: {parameters:,} parameters in {', '.join(config.parts())}"
    (stream,) = config.streams.values()
    objectives = ", ".join(f"{name} {weight:g}" for name, weight in stream.objectives.items())
    yield f"training: {config.steps:,} steps of {stream.data.batch_size} examples; objectives: {objectives}"
    for key, evaluation in config.evaluations.items():
        yield f"evaluation {key}: {evaluation.task}"
    for file, exists in sorted(_path_existence(config).items()):
        yield f"{'here   ' if exists else 'missing'}  {file}"
    yield f"train it with: mplug2 train --config {name} --config.init_from=RUN --workdir runs/{name}"


def _read(name: str, size: str) -> "tuple[RunConfig, int]":
    """Return a task's run and the number of its parameters."""
    from mplug2_jax.model.mplug2 import define_model
    from mplug2_jax.training.durations import load_run_config

    config = load_run_config(f"{name}:{size}")
    return config, define_model(config.model, config.parts()).num_params()


def _path_existence(config: "RunConfig") -> dict[str, bool]:
    """Return whether the paths of a run exist."""
    from data_pipelines.sources.files import path_exists

    return {path: path_exists(path) for path in config.data_paths()}


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
