"""``mplug2``: the commands, their help, and errors as one-line messages."""

import argparse
import errno
import gc
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from data_pipelines.errors import DataError, DataWorkerError, StorageUnavailableError
from data_pipelines.storage.object_log import closing_logs
from data_pipelines.storage.retry import is_transient
from mplug2_jax import __version__
from mplug2_jax.cli import (
    completion,
    config,
    convert,
    corpora,
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
from mplug2_jax.cli.parsing import SuggestingParser, add_verbosity, parse_args
from mplug2_jax.console import configure_logging
from mplug2_jax.errors import OUTPUT_CLOSED, PREEMPTED, UNAVAILABLE, USER_ERROR, Preempted, UserError

# Each module adds one parser and sets its ``run``; a command imports heavy packages when it runs, to keep --help fast.
COMMANDS = {
    "Train": (train, demo, tasks, config),
    "Evaluate and use": (evaluate, generate, embed, report, replay),
    "Data": (data, corpora),
    "Plan and launch": (plan, launch),
    "Weights": (convert,),
    "Shell": (completion,),
}


class _Parser(SuggestingParser):
    """The parser of the whole command line, whose help groups the commands by purpose."""

    def __init__(self) -> None:
        super().__init__(
            prog="mplug2", description="mPLUG-2 in JAX: pretrain, evaluate, generate, embed, plan, convert."
        )
        self.add_argument("--version", action="version", version=f"mplug2 {__version__}")
        self.set_defaults(verbosity=0)
        add_verbosity(self)
        commands = self.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=SuggestingParser)
        self._listing: list[str] = []
        for purpose, modules in COMMANDS.items():
            previous = set(commands.choices)
            for module in modules:
                module.add_parser(commands)
            self._listing.append(f"\n{purpose}:")
            for name, command in commands.choices.items():
                if name not in previous:
                    summary = (command.description or "").partition(".\n")[0].rstrip(".")
                    self._listing.append(f"  {name:<11} {summary}")

    def format_help(self) -> str:
        """Return usage, commands, options and an example."""
        lines = [
            f"{self.format_usage()}\n{self.description}",
            *self._listing,
            "\noptions:",
            "  -h, --help     show this help; after a command, its options and an example",
            "  --version      show the version",
            "  -v, --verbose  log debug messages; before or after the command",
            "  --quiet        log warnings and errors only; before or after the command",
            "\nexample:\n  mplug2 train --config demo --workdir runs/demo",
        ]
        return "\n".join(lines) + "\n"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    return _Parser()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command and its options; exit with status 2 and a message if they are invalid.

    Without arguments, print the help and exit with status 0.
    """
    top = make_parser()
    words = sys.argv[1:] if argv is None else argv
    if not words:
        top.print_help()
        top.exit()
    return parse_args(top, words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 success, 1 a check failed, 2 an error that the user can fix, 69 storage did not answer or a
        data worker was killed, 75 preempted (after both, run the same command again), 130 interrupted.

    Raises:
        BrokenPipeError: the reader closed stdout; :func:`program` exits with 141.
    """
    try:
        args = parse(argv)
        configure_logging(args.verbosity)
        run: Callable[[argparse.Namespace], int] = args.run
        with closing_logs():
            status = run(args)
        sys.stdout.flush()  # here, where its errors are caught
        return status
    except (UserError, DataError) as error:
        return _exit_with(USER_ERROR, f"error: {' '.join(str(error).split())}")
    except (StorageUnavailableError, DataWorkerError) as error:
        return _exit_with(UNAVAILABLE, f"error: {error}")
    except OSError as error:
        if is_transient(error) and not isinstance(error, BrokenPipeError):  # that is a reader of the output
            return _exit_with(UNAVAILABLE, f"error: {error}; start again later")
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        return _exit_with(USER_ERROR, f"error: {error.filename or 'writing'}: {error.strerror}")
    except Preempted as preempted:
        # All processes come here, so they can shut down cleanly.
        logging.warning("%s", preempted)
        return PREEMPTED
    except KeyboardInterrupt:
        return _exit_with(130, "interrupted")


def _exit_with(status: int, message: str) -> int:
    """Print why a command failed; one of several processes exits at once, because the others may wait for it."""
    print(f"mplug2: {message}", file=sys.stderr)
    if "jax" in sys.modules:
        from mplug2_jax.parallel.processes import exit_if_distributed

        exit_if_distributed(status)
    return status


def program() -> None:
    """Run a command and exit; the installed script calls this.

    A failed restore of a checkpoint leaves reads that outlive their event loop; Python would report each of them below
    the error message, so those reports are suppressed.
    """

    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report
    gc.set_threshold(20_000, 20, 20)  # tracing a step makes objects so fast that collections take 5 % of a short run
    try:
        status = main()
    except BrokenPipeError:
        if not _discard_closed_output():
            raise
        status = OUTPUT_CLOSED
    sys.exit(status)


def _discard_closed_output() -> bool:
    """Discard the rest of the output if its reader closed it, as ``head`` does; return whether it did."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    closed = any(events & select.POLLERR for _, events in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # or Python reports the rest once more on exit
    return closed


if __name__ == "__main__":
    program()
