"""``mplug2``: the commands, their help, and errors as sentences."""

import argparse
import sys
from collections.abc import Callable, Sequence

from data_pipelines.errors import DataError
from mplug2_jax import __version__
from mplug2_jax.cli import convert, data, evaluate, generate, plan, report, train
from mplug2_jax.errors import UserError

# Each module adds one parser and sets its ``run``; heavy imports wait until a command runs, so that --help is instant.
COMMANDS = (train, evaluate, generate, plan, convert, data, report)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(
        prog="mplug2",
        description="mPLUG-2 in JAX: pretrain, evaluate, generate, plan, convert.",
        epilog="example:\n  mplug2 train --config demo --workdir runs/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"mplug2 {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Exit status: 0 well, 1 a check failed, 2 something the user can mend."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    overrides = [word for word in rest if word.startswith("--config.")]
    unknown = [word for word in rest if not word.startswith("--config.")]
    if unknown or (overrides and not hasattr(args, "overrides")):
        top.error(f"unrecognised arguments: {' '.join(unknown or overrides)}")
    args.overrides = overrides
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except (UserError, DataError) as error:
        print(f"mplug2: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"mplug2: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mplug2: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
