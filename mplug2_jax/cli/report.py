"""``mplug2 report``: draw a run or its evaluations, or compare two of them."""

import argparse
from typing import Any

from data_pipelines.storage.paths import to_path
from mplug2_jax.cli.common import add_command
from mplug2_jax.cli.parsing import output_path
from mplug2_jax.errors import UserError


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "report", run,
        summary="Draw a run as one self-contained HTML page, or compare two runs",
        details="The page has results, samples, curves, events and the config. A comparison has the evaluations that "
        "both runs have, and the examples whose scores differ most.",
        example="mplug2 report runs/demo\n  mplug2 report runs/demo --against runs/other",
    )  # fmt: skip
    parser.add_argument(
        "folder", type=to_path, help="work directory of a training run, active or finished, or the --out of mplug2 eval"
    )
    parser.add_argument("--against", type=to_path, metavar="DIR", help="another one, to compare with")
    parser.add_argument(
        "--out", type=output_path, metavar="FILE",
        help="with --against: the new page (default: against-OTHER.html in the first folder)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Write ``report.html``, or a comparison, and print its path."""
    from mplug2_jax.report import write_comparison, write_report

    if args.against is not None:
        print(write_comparison(args.folder, args.against, args.out))
    elif args.out is not None:
        raise UserError("--out needs --against: remove it, or name a folder to compare with")
    else:
        print(write_report(args.folder))
    return 0
