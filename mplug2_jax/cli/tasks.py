"""``mplug2 tasks``: what there are recipes for, what they need, and whether it is here."""

import argparse
import ast
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mplug2_jax.cli.common import add_command, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mplug2_jax.training.config import RunConfig


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "tasks", run,
        summary="List the downstream tasks, and whether their data is here",
        details="Each has its parts of the model and its number of parameters; data is looked for in $MPLUG2_DATA, "
        "or ./data. With a name: what that task's data is, where it comes from, and what is missing.",
        example="mplug2 tasks msrvtt_qa",
    )  # fmt: skip
    parser.add_argument("name", nargs="?", help="of a task, for all that is known of it")
    parser.add_argument("--size", default="large", help="of the model (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Prints the table, or a task's page."""
    from mplug2_jax.config import shipped_recipes
    from mplug2_jax.errors import UserError, did_you_mean
    from mplug2_jax.recipes.base import data_folder

    pages = {name: path for name, path in shipped_recipes().items() if path.parent.name == "tasks"}
    if args.name is not None:
        if args.name not in pages:
            raise UserError(f"task '{args.name}' is unknown: {did_you_mean(args.name, pages)}")
        print("\n".join(_page(args.name, pages[args.name], args.size)))
        return 0
    rows = []
    for name, path in sorted(pages.items()):
        config, parameters = _read(name, args.size)
        there, all_of_it = _found(config)
        here = "yes" if there == all_of_it else f"{there} of {all_of_it}" if there else "no"
        rows.append((name, _title(path).partition(":")[0], ", ".join(config.parts()), f"{parameters / 1e6:,.0f}", here))
    print(table(rows, ("task", "what", "parts", "million", "data here"), right=(3,)))
    print(f"\ndata is looked for in {data_folder().absolute()}; mplug2 tasks NAME says what a task needs")
    return 0


def _page(name: str, path: Path, size: str) -> "Iterator[str]":
    config, parameters = _read(name, size)
    yield _docstring(path)
    yield ""
    yield f"model: {parameters:,} parameters in {', '.join(config.parts())}"
    (stream,) = config.streams.values()
    learned = ", ".join(f"{name} {weight:g}" for name, weight in stream.objectives.items())
    yield f"training: {config.steps:,} steps of {stream.data.batch_size} examples; objectives: {learned}"
    for key, evaluation in config.evaluations.items():
        yield f"evaluation {key}: {evaluation.task}"
    for read, exists in sorted(_paths(config).items()):
        yield f"{'here   ' if exists else 'missing'}  {read}"
    yield f"train it with: mplug2 train --config {name} --config.init_from=RUN --workdir runs/{name}"


def _read(name: str, size: str) -> "tuple[RunConfig, int]":
    """A task's run, and how many parameters its model has."""
    from mplug2_jax.config import build, load_recipe
    from mplug2_jax.model.mplug2 import define_model
    from mplug2_jax.training.config import RunConfig

    config = build(RunConfig, load_recipe(f"{name}:{size}"))
    return config, define_model(config.model, config.parts()).num_params()


def _paths(config: "RunConfig") -> dict[str, bool]:
    """All that a run reads, and whether it exists; a pattern does where a file fits it."""
    data = [stream.data for stream in config.streams.values()] + [each.data for each in config.evaluations.values()]
    sources = [source for each in data for source in each.sources.values()]
    return {path: _exists(path) for source in sources for path in (source.path, source.media) if path}


def _exists(path: str) -> bool:
    place = Path(path)
    return next(place.parent.glob(place.name), None) is not None


def _found(config: "RunConfig") -> tuple[int, int]:
    exist = _paths(config).values()
    return sum(exist), len(exist)


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _title(path: Path) -> str:
    return _docstring(path).partition("\n")[0]
