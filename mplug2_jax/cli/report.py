"""``mplug2 report``: draw a run or its evaluations, or two of them side by side."""

import argparse
from pathlib import Path
from typing import Any

from mplug2_jax.cli.common import add_command
from mplug2_jax.errors import UserError


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "report", run,
        summary="Draw a run as one self-contained page, or two side by side",
        details="A page has results, samples, curves and the config. Two runs are compared by the same evaluations, "
        "and by the examples on which they differ.",
        example="mplug2 report runs/demo\n  mplug2 report runs/demo --against runs/other",
    )  # fmt: skip
    parser.add_argument(
        "folder", type=Path, help="work directory of a training run, finished or not, or the --out of mplug2 eval"
    )
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another of these, to compare with")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="with --against: new page (default: against-OTHER.html in the first)"
    )


def run(args: argparse.Namespace) -> int:
    """Writes ``report.html``, or the page that compares."""
    from mplug2_jax.report import write_comparison, write_report

    if args.against is not None:
        print(write_comparison(args.folder, args.against, args.out))
    elif args.out is not None:
        raise UserError("--out is for --against; leave it out, or give that")
    else:
        print(write_report(args.folder))
    return 0
