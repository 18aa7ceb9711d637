"""``mplug2 completion``: what makes a shell complete commands, options, recipes and paths."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mplug2_jax.cli.common import add_command

RECIPES = {"config", "recipe", "spec", "task"}
"""Where a recipe is named, by its name or its file."""
PATHS = {"inputs", "workdir"}
"""Where a path is taken as text, as it may be a URL."""


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "completion", run,
        summary="Print a script that completes commands in a shell",
        details="To install it:\n"
        "  bash: mplug2 completion bash > ~/.mplug2.bash && echo '. ~/.mplug2.bash' >> ~/.bashrc\n"
        "  zsh:  mplug2 completion zsh > \"${fpath[1]}/_mplug2\"\n"
        "  tcsh: mplug2 completion tcsh > ~/.mplug2.tcsh && echo 'source ~/.mplug2.tcsh' >> ~/.tcshrc",
        example="mplug2 completion bash",
    )  # fmt: skip
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="which shell")


def run(args: argparse.Namespace) -> int:
    """Prints the script."""
    import shtab

    from mplug2_jax.cli.main import parser
    from mplug2_jax.config import shipped_recipes

    top, recipes = parser(), _recipes(" ".join(shipped_recipes()))
    for action in _actions(top):
        if action.choices is not None or action.nargs == 0 or action.metavar == "FORMAT:PATH":
            continue
        if action.dest in RECIPES:
            action.complete = recipes  # type: ignore[attr-defined]
        elif action.metavar == "DIR":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.type is Path or action.dest in PATHS:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(top, args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All options and positionals of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


def _recipes(names: str) -> dict[str, Any]:
    """What completes a recipe, in shtab's form: names of shipped ones, and files; files alone in tcsh."""
    bash = f'_mplug2_recipe_files() {{\n  compgen -W "{names}" -- "$1"\n  compgen -f -- "$1"\n}}'
    zsh = f"{{compadd {names}; _files}}"
    return {"bash": "_mplug2_recipe_files", "zsh": zsh, "tcsh": "f", "preamble": {"bash": bash}}
