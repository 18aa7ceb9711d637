"""``mplug2 completion``: print a script that completes commands, options, recipes and paths in a shell."""

import argparse
from collections.abc import Iterator
from typing import Any

from data_pipelines.storage.paths import to_path
from mplug2_jax.cli.common import add_command
from mplug2_jax.cli.parsing import output_path

RECIPES = {"config", "recipe", "spec"}
"""Arguments that take a recipe."""
PATHS = {"inputs", "workdir"}
"""Arguments that take a path as text, because it may be a URL."""


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "completion", run,
        summary="Print a shell completion script",
        details="To install it:\n"
        "  bash: mplug2 completion bash > ~/.mplug2.bash && echo '. ~/.mplug2.bash' >> ~/.bashrc\n"
        "  zsh:  mplug2 completion zsh > \"${fpath[1]}/_mplug2\"\n"
        "  tcsh: mplug2 completion tcsh > ~/.mplug2.tcsh && echo 'source ~/.mplug2.tcsh' >> ~/.tcshrc",
        example="mplug2 completion bash",
    )  # fmt: skip
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    import shtab

    from mplug2_jax.cli.main import make_parser
    from mplug2_jax.config import shipped_recipes

    top, recipes = make_parser(), _complete_recipe(" ".join(shipped_recipes()))
    for action in _actions(top):
        if action.choices is not None or action.nargs == 0 or action.metavar == "FORMAT:PATH":
            continue
        if action.dest in RECIPES:
            action.complete = recipes  # type: ignore[attr-defined]
        elif action.metavar == "DIR":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.type in (to_path, output_path) or action.dest in PATHS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(top, args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield all options and positionals of a parser and its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


def _complete_recipe(names: str) -> dict[str, Any]:
    """Return shtab's completion of a recipe: shipped names and files (tcsh: files)."""
    bash = f'_mplug2_recipe_files() {{\n  compgen -W "{names}" -- "$1"\n  compgen -f -- "$1"\n}}'
    zsh = f"{{compadd {names}; _files}}"
    return {"bash": "_mplug2_recipe_files", "zsh": zsh, "tcsh": "f", "preamble": {"bash": bash}}
