"""Command-line parsers: suggestions for misspelled choices, and ``--config.field=value`` overrides."""

import argparse
import dataclasses
import difflib
import itertools
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from data_pipelines.errors import DataError
from data_pipelines.storage.paths import RemotePath, check_can_write, to_path
from mplug2_jax.errors import UserError


class SuggestingParser(argparse.ArgumentParser):
    """Argument parser whose errors suggest the nearest valid choice."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and the message."""
        if wrong := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            near = difflib.get_close_matches(wrong[1], re.findall(r"[\w.-]+", wrong[2]), n=1, cutoff=0.5)
            message += f": did you mean '{near[0]}'?" if near else ""
        super().error(message)


def output_path(text: str) -> Path:
    """Return the path of an option that names a file or folder to write.

    Raises:
        DataError: as :func:`to_path`; or a whole bucket, which may hold anything.
    """
    path = to_path(text)
    if isinstance(path, RemotePath) and path.is_bucket:
        raise DataError(f"{text}: expected a file or folder in the bucket, as in {path / 'runs' / 'one'}")
    return path


def check_output(option: str, path: Path | None, *, new: bool = True, parent: bool = False) -> None:
    """Check, before any long work, that an output can be written.

    Args:
        option: that names it, for messages.
        path: of the output; None: not requested.
        new: whether it must not exist.
        parent: whether its folder must, where folders exist at all.

    Raises:
        UserError: it exists, or its folder does not.
        DataError: an object store refuses.
    """
    if path is None:
        return
    if new and path.exists():
        raise UserError(f"{option} {path} exists; remove it, or choose another name")
    folder = path.absolute().parent
    if parent and not isinstance(path, RemotePath) and not folder.is_dir():
        raise UserError(f"{option} {path}: folder {folder} does not exist; create it first")
    check_can_write(path)


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose what is logged, which a command takes before and after its name."""
    group, suppress = parser.add_mutually_exclusive_group(), argparse.SUPPRESS
    group.add_argument(
        "-v", "--verbose", dest="verbosity", action="store_const", const=1, default=suppress, help="log debug messages"
    )
    group.add_argument(
        "--quiet", dest="verbosity", action="store_const", const=-1, default=suppress,
        help="log warnings and errors only",
    )  # fmt: skip


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; ``--config.field=value`` words become ``overrides`` of commands that accept them.

    Invalid arguments exit with status 2 and an error that names them.
    """
    for word, value in itertools.pairwise(argv):
        if re.fullmatch(r"--config\.[\w.]+", word) and not value.startswith("--"):
            parser.error(f"{word} {value} are two words, and an override is one: {shlex.quote(f'{word}={value}')}")
    args, remaining = parser.parse_known_args(argv)
    overrides = [word for word in remaining if word.startswith("--config.")]
    unknown = [word for word in remaining if not word.startswith("--config.")]
    if unknown or (overrides and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or overrides)}{_hint(args, unknown, list(argv))}")
    args.overrides = overrides
    return args


def _hint(args: argparse.Namespace, unknown: list[str], words: list[str]) -> str:
    """Return a suggestion for unknown arguments, or an empty string."""
    if getattr(args, "subcommand", "") == "local" and "--" not in words:
        words.insert(words.index(args.launched[0]), "--")
        return f": put -- before the command: mplug2 {shlex.join(words)}"
    if unknown and hasattr(args, "overrides") and (name := re.match(r"--([\w.]+)", unknown[0])):
        from mplug2_jax.training.config import RunConfig

        if name[1].partition(".")[0] in {field.name for field in dataclasses.fields(RunConfig)}:
            return f": a field of the recipe is set by --config.{name[1]}=VALUE"
    return ""
