"""``mplug2 launch``: a command on several processes."""

import argparse
import sys
from typing import Any

from mplug2_jax.cli.common import add_command, add_group
from mplug2_jax.errors import UserError, check_range, did_you_mean

LAUNCHED = ("train", "eval")


def add_parser(commands: Any) -> None:
    """Adds the commands."""
    group = add_group(
        commands, "launch",
        what="Start a run as several processes.",
        example="mplug2 launch local --processes 2 -- train --config demo --workdir runs/two",
    )  # fmt: skip
    local = add_command(
        group, "local", run_local,
        what="Start a run as several processes on this machine, with simulated CPU devices; all end when one does.",
        example="mplug2 launch local --processes 4 --devices-per-process 2 -- train --config demo --workdir runs/four",
    )  # fmt: skip
    local.add_argument("--processes", type=int, required=True, help="how many")
    local.add_argument("--devices-per-process", type=int, default=1, help="devices that each simulates (default: 1)")
    local.add_argument(
        "--max-restarts", type=int, default=0, help="start all again after a failure, so many times (default: 0)"
    )
    local.add_argument("words", nargs="+", metavar="COMMAND", help="after --: the train or eval command to start")


def run_local(args: argparse.Namespace) -> int:
    """Runs the command and returns its status."""
    from mplug2_jax.cli.main import parse
    from mplug2_jax.launch.local import LocalProcesses

    for name, least in (("processes", 1), ("devices_per_process", 1), ("max_restarts", 0)):
        check_range(f"--{name.replace('_', '-')}", getattr(args, name), least)
    if args.words[0] not in LAUNCHED:
        raise UserError(f"{args.words[0]!r} does not run on several processes: {did_you_mean(args.words[0], LAUNCHED)}")
    parse(args.words)  # a mistake is said once, and not by every process
    command = [sys.executable, "-m", "mplug2_jax.cli.main", *args.words]
    return LocalProcesses(command, args.processes, args.devices_per_process).run(args.max_restarts)
