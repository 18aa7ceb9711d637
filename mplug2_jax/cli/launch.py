"""``mplug2 launch``: a run on several processes here, or on machines that a scheduler has."""

import argparse
import functools
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mplug2_jax.cli.common import add_command, add_group
from mplug2_jax.cli.parsing import parse_words
from mplug2_jax.errors import UserError, check_range, did_you_mean

if TYPE_CHECKING:
    from mplug2_jax.launch.job import Job, Launch

MULTIPROCESS_COMMANDS = ("train", "eval", "embed")


def add_parser(commands: Any) -> None:
    """Adds the commands."""
    group = add_group(
        commands, "launch",
        summary="Start a run on several processes, here or on a cluster",
        details="Clusters are those of SLURM, GKE and the Cloud TPU service.",
        example="mplug2 launch local --processes 2 -- train --config demo --workdir runs/two",
    )  # fmt: skip
    _add_local(group, commands.choices)
    _add_slurm(group)
    _add_gke(group)
    _add_tpu_vm(group)


def _add_local(group: Any, parsers: Mapping[str, argparse.ArgumentParser]) -> None:
    local = add_command(
        group, "local", functools.partial(run_local, parsers=parsers),
        summary="Start a run as several processes on this machine",
        details="Each simulates CPU devices; all of them end when one does.",
        example="mplug2 launch local --processes 4 --devices-per-process 2 -- train --config demo --workdir runs/four",
    )  # fmt: skip
    local.add_argument("--processes", type=int, required=True, help="how many")
    local.add_argument("--devices-per-process", type=int, default=1, help="devices that each simulates (default: 1)")
    local.add_argument(
        "--max-restarts", type=int, default=0, help="start all again after a failure, so many times (default: 0)"
    )
    local.add_argument(
        "launched", nargs="+", metavar="COMMAND", help="after --: the train, eval or embed command to start"
    )


def _add_slurm(group: Any) -> None:
    slurm = add_command(
        group, "slurm", run_slurm, config=True,
        summary="Print the sbatch file of a training run on SLURM",
        details="It has one task for each host, and queues itself again when preempted.",
        example="mplug2 launch slurm --config demo --topology h100:64 --workdir /shared/runs/demo --time 12:00:00",
    )  # fmt: skip
    _add_job(slurm)
    slurm.add_argument("--partition", help="of the cluster (default: its own)")
    slurm.add_argument("--account", help="who pays (default: the cluster's)")
    slurm.add_argument("--time", help="after which SLURM ends the job (default: the partition's), as in 12:00:00")
    slurm.add_argument("--image", help="container to run in, by Pyxis (default: none, the environment of sbatch)")


def _add_gke(group: Any) -> None:
    gke = add_command(
        group, "gke", run_gke, config=True,
        summary="Print the JobSet of a training run on TPU slices of GKE",
        details="The commands of xpk that do the same are printed too.",
        example="mplug2 launch gke --config demo --topology v5p:4x4x4 --workdir gs://bucket/demo "
        "--image REGISTRY/mplug2:1",
    )  # fmt: skip
    _add_job(gke)
    gke.add_argument("--image", required=True, help="container image, made of launch/Dockerfile.tpu")
    gke.add_argument("--queue", help="local queue of Kueue (default: none, pods are made at once)")
    gke.add_argument("--namespace", help="of Kubernetes (default: kubectl's)")
    gke.add_argument("--service-account", help="that may write into the bucket (default: the namespace's)")
    gke.add_argument("--spot", action="store_true", help="on machines that may be taken away")
    gke.add_argument("--cluster", default="CLUSTER", help="its name, for xpk")


def _add_tpu_vm(group: Any) -> None:
    tpu_vm = add_command(
        group, "tpu-vm", run_tpu_vm, config=True,
        summary="Print a script that trains on slices of the Cloud TPU service",
        details="The script asks for slices until they are there, trains on all of their hosts, and asks again when "
        "they are taken away.",
        example="mplug2 launch tpu-vm --config demo --topology v6e:4x4 --workdir gs://bucket/demo --zone us-east5-a "
        "--image REGISTRY/mplug2:1",
    )  # fmt: skip
    _add_job(tpu_vm)
    tpu_vm.add_argument("--image", required=True, help="container image, made of launch/Dockerfile.tpu")
    tpu_vm.add_argument("--zone", required=True, help="of the Google Cloud")
    tpu_vm.add_argument("--project", help="of the Google Cloud (default: gcloud's)")
    tpu_vm.add_argument("--runtime-version", help="software of the machines (default: the usual one of the chip)")
    kind = tpu_vm.add_mutually_exclusive_group()
    kind.add_argument("--spot", action="store_true", help="machines that may be taken away")
    kind.add_argument("--reserved", action="store_true", help="machines of a reservation")


def _add_job(parser: argparse.ArgumentParser) -> None:
    """What every scheduler's job has."""
    parser.add_argument("--plan", type=Path, help="plan.json of mplug2 plan: the recipe, its overrides, the machines")
    parser.add_argument("--config", help="without --plan: recipe, as mplug2 train has it")
    parser.add_argument("--topology", help="without --plan: machines, as in v5p:8x8x8 or h100:64")
    parser.add_argument("--slices", type=int, help="without --plan: of the topology (default: 1)")
    parser.add_argument("--workdir", required=True, help="where the run keeps everything; resumes if it exists")
    parser.add_argument("--name", help="of the job (default: the last part of --workdir)")
    parser.add_argument("--grace", type=int, default=120, help="seconds to save, once told to end (default: 120)")
    parser.add_argument(
        "--max-restarts", type=int, default=100, help="start again after faults, so many times (default: 100)"
    )
    parser.add_argument("--out", type=Path, help="write the file, and print only what to do with it")
    parser.add_argument(
        "--submit", action="store_true", help="write the file (default: NAME with its ending) and do it"
    )


def run_local(args: argparse.Namespace, parsers: Mapping[str, argparse.ArgumentParser]) -> int:
    """Run the command as several processes and return its exit status.

    Args:
        args: of ``launch local``.
        parsers: the parsers of all commands, to check the launched command once, before any process starts.
    """
    from mplug2_jax.cli.train import chosen
    from mplug2_jax.launch.local import LocalProcesses

    for option, least in (("processes", 1), ("devices_per_process", 1), ("max_restarts", 0)):
        check_range(f"--{option.replace('_', '-')}", getattr(args, option), least)
    command, *options = args.launched
    if command not in MULTIPROCESS_COMMANDS:
        raise UserError(
            f"{command!r} does not run on several processes: {did_you_mean(command, MULTIPROCESS_COMMANDS)}"
        )
    launched = parse_words(parsers[command], options)
    if command == "train":
        chosen(launched.config, launched.plan, launched.overrides)
    verbosity = {-1: ["--quiet"], 1: ["--verbose"]}.get(args.verbosity, [])
    words = [sys.executable, "-m", "mplug2_jax.cli.main", *verbosity, *args.launched]
    return LocalProcesses(words, args.processes, args.devices_per_process).run(args.max_restarts)


def run_slurm(args: argparse.Namespace) -> int:
    """Prints or submits the sbatch file."""
    from mplug2_jax.launch.slurm import SlurmOptions, launch_slurm

    options = SlurmOptions(partition=args.partition, account=args.account, time=args.time, image=args.image)
    return _finish(launch_slurm(_job(args), options), args)


def run_gke(args: argparse.Namespace) -> int:
    """Prints or applies the JobSet."""
    from mplug2_jax.launch.gke import GkeOptions, launch_gke

    options = GkeOptions(
        image=args.image, queue=args.queue, namespace=args.namespace, service_account=args.service_account,
        spot=args.spot, cluster=args.cluster,
    )  # fmt: skip
    return _finish(launch_gke(_job(args), options), args)


def run_tpu_vm(args: argparse.Namespace) -> int:
    """Prints or runs the script."""
    from mplug2_jax.launch.tpu_vm import TpuVmOptions, launch_tpu_vm

    options = TpuVmOptions(
        image=args.image, zone=args.zone, project=args.project, runtime=args.runtime_version, spot=args.spot,
        reserved=args.reserved,
    )  # fmt: skip
    return _finish(launch_tpu_vm(_job(args), options), args)


def _job(args: argparse.Namespace) -> "Job":
    from mplug2_jax.launch.job import make_job, plan_of

    plan = plan_of(
        plan=args.plan, config=args.config, overrides=args.overrides, topology=args.topology, slices=args.slices
    )
    return make_job(plan, workdir=args.workdir, name=args.name, grace=args.grace, max_restarts=args.max_restarts)


def _finish(launch: "Launch", args: argparse.Namespace) -> int:
    """Prints the file and what to do with it, or does it."""
    from mplug2_jax.launch.templates import shell_command

    path = args.out or Path(launch.filename)
    if args.out or args.submit:
        _write(launch.text, path)
        print(f"{path} is written")
    else:
        print(launch.text)
    for note in launch.notes:
        print(f"# {' '.join(note.split())}")
    submit = [*launch.submit, str(path)]
    if args.submit:
        print(f"$ {shell_command(submit)}", flush=True)
        return _run(submit)
    print(f"# to submit it (or --submit):\n$ {shell_command(submit)}")
    for what, commands in launch.others:
        print("\n".join([f"\n# {what}:", *(f"$ {shell_command(command)}" for command in commands)]))
    return 0


def _write(text: str, path: Path) -> None:
    """Writes the file, and never over another. Raises UserError."""
    if path.exists() and path.read_bytes() != text.encode():
        raise UserError(
            f"--out {path} exists and differs from what would be written; choose another name, or remove it"
        )
    path.write_text(text, encoding="utf-8")


def _run(command: list[str]) -> int:
    """Runs the command and returns its status. Raises UserError where it is not installed."""
    try:
        return subprocess.run(command).returncode
    except FileNotFoundError as error:
        raise UserError(
            f"{command[0]} is not installed here; copy the file to where it is, and run it there"
        ) from error
