"""``mplug2``: the commands, their help, and errors as sentences."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from data_pipelines.errors import DataError
from mplug2_jax import __version__
from mplug2_jax.cli import (
    completion,
    config,
    convert,
    data,
    demo,
    embed,
    evaluate,
    generate,
    launch,
    plan,
    replay,
    report,
    tasks,
    train,
)
from mplug2_jax.cli.parsing import SuggestingParser, parse_words
from mplug2_jax.errors import PREEMPTED, USER_ERROR, Preempted, UserError

# Each module adds one parser and sets its ``run``; heavy imports wait until a command runs, so that --help is instant.
COMMANDS = {
    "Train": (train, demo, tasks, config),
    "Evaluate and use": (evaluate, generate, embed, report, replay),
    "Data": (data,),
    "Plan and launch": (plan, launch),
    "Weights": (convert,),
    "Shell": (completion,),
}


class _Parser(SuggestingParser):
    """The parser of the whole command line, whose help lists the commands by their purpose."""

    def __init__(self) -> None:
        super().__init__(
            prog="mplug2", description="mPLUG-2 in JAX: pretrain, evaluate, generate, embed, plan, convert."
        )
        self.add_argument("--version", action="version", version=f"mplug2 {__version__}")
        commands = self.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=SuggestingParser)
        self._listing: list[str] = []
        for purpose, modules in COMMANDS.items():
            listed = set(commands.choices)
            for module in modules:
                module.add_parser(commands)
            self._listing.append(f"\n{purpose}:")
            for name, command in commands.choices.items():
                if name not in listed:
                    summary = (command.description or "").partition(".\n")[0].rstrip(".")
                    self._listing.append(f"  {name:<11} {summary}")

    def format_help(self) -> str:
        """Usage, commands, options and an example."""
        lines = [
            f"{self.format_usage()}\n{self.description}",
            *self._listing,
            "\noptions:",
            "  -h, --help  show this help; after a command, its options and an example",
            "  --version   show the version",
            "\nexample:\n  mplug2 train --config demo --workdir runs/demo",
        ]
        return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    return _Parser()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command and its options; wrong ones end the process with status 2 and a line that names them.

    Without any word the commands are listed, and the process ends well.
    """
    top = parser()
    words = sys.argv[1:] if argv is None else argv
    if not words:
        top.print_help()
        top.exit()
    return parse_words(top, words)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Exit status: 0 well, 1 a check failed, 2 something the user can mend, 75 told to end and to be started again.
    """
    args = parse(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except (UserError, DataError) as error:
        return _ended(USER_ERROR, f"error: {' '.join(str(error).split())}")
    except OSError as error:
        if error.filename is None:
            raise
        return _ended(USER_ERROR, f"error: {error.filename}: {error.strerror}")
    except Preempted as preempted:
        # All processes end here, so they can part in order.
        print(f"mplug2: {preempted}", file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        return _ended(130, "interrupted")


def _ended(status: int, why: str) -> int:
    """Says why a command ended early; a process among others ends here and now, because they may wait for it."""
    print(f"mplug2: {why}", file=sys.stderr)
    if "jax" in sys.modules:
        from mplug2_jax.parallel.processes import exit_if_distributed

        exit_if_distributed(status)
    return status


def program() -> None:
    """The whole process: a command, and nothing said after it.

    A checkpoint that cannot be restored leaves reads behind that end after their event loop has, each of which Python
    would report below the sentence that says what is wrong.
    """

    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report
    sys.exit(main())


if __name__ == "__main__":
    program()
