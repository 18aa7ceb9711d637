"""``mplug2 report``: draw a run."""

import argparse
from pathlib import Path
from typing import Any

from mplug2_jax.cli.common import add_command


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "report", run,
        what="Draw a work directory as one self-contained page: results, samples, curves, config.",
        example="mplug2 report runs/demo",
    )  # fmt: skip
    parser.add_argument("workdir", type=Path, help="work directory of a training run, finished or not")


def run(args: argparse.Namespace) -> int:
    """Writes ``report.html``."""
    from mplug2_jax.report import write_report

    print(write_report(args.workdir))
    return 0
