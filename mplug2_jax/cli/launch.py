"""``mplug2 launch``: start a run as several processes on this machine, or submit it to a scheduler."""

import argparse
import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.storage.paths import to_path
from mplug2_jax.cli.common import add_command, add_group
from mplug2_jax.cli.parsing import parse_args
from mplug2_jax.errors import UserError, check_range, did_you_mean

if TYPE_CHECKING:
    from mplug2_jax.launch.data_job import DataJob
    from mplug2_jax.launch.job import Job, Submission

MULTIPROCESS_COMMANDS = ("train", "eval", "embed", "data")
_SLICE_TIMEOUT = 600  # seconds
_MOUNT_HELP = "gs://BUCKET or gs://BUCKET/FOLDER to mount read-only at /gcs (default: none; gs:// paths need no mount)"


def add_parser(subparsers: Any) -> None:
    """Add the commands."""
    subcommands = add_group(
        subparsers, "launch",
        summary="Start a run on several processes, here or on a cluster",
        details="Supported clusters: SLURM, GKE and the Cloud TPU service.",
        example="mplug2 launch local --processes 2 -- train --config demo --workdir runs/two",
    )  # fmt: skip
    _add_local(subcommands, subparsers.choices)
    _add_slurm(subcommands, subparsers.choices)
    _add_gke(subcommands, subparsers.choices)
    _add_tpu_vm(subcommands)


def _add_local(subparsers: Any, parsers: Mapping[str, argparse.ArgumentParser]) -> None:
    local = add_command(
        subparsers, "local", functools.partial(run_local, parsers=parsers),
        summary="Start a run as several processes on this machine",
        details="Each process simulates CPU devices. When one exits, all of them are stopped. A data command (convert, "
        "validate, index, chunk) is divided among independent workers instead, and their work is joined at the end.",
        example="mplug2 launch local --processes 4 --devices-per-process 2 -- train --config demo --workdir runs/four",
    )  # fmt: skip
    local.add_argument("--processes", type=int, required=True, help="number of processes")
    local.add_argument(
        "--devices-per-process", type=int, default=1, help="simulated CPU devices per process (default: 1)"
    )
    local.add_argument(
        "--max-restarts", type=int, default=0, help="restarts of all processes after a failure (default: 0)"
    )
    local.add_argument("--slices", type=int, default=1, help="simulated slices of the processes (default: 1)")
    _add_min_slices(local)
    local.add_argument(
        "launched", nargs="+", metavar="COMMAND", help="after --: the train, eval, embed or data command to run"
    )


def _add_slurm(subparsers: Any, parsers: Mapping[str, argparse.ArgumentParser]) -> None:
    slurm = add_command(
        subparsers, "slurm", functools.partial(run_slurm, parsers=parsers), accepts_overrides=True,
        summary="Print the sbatch file of a training run on SLURM, or of data workers",
        details="A run has one task per host, and requeues itself after preemption.\n"
        "With --workers, the data command after -- becomes an array of independent workers: mplug2 launch slurm "
        "--workers 64 -- data convert webdataset:shards --shards 256 --out records",
        example="mplug2 launch slurm --config demo --topology h100:64 --workdir /shared/runs/demo --time 12:00:00",
    )  # fmt: skip
    _add_job_options(slurm)
    slurm.add_argument("--partition", help="partition (default: the cluster's)")
    slurm.add_argument("--account", help="account to charge (default: the cluster's)")
    slurm.add_argument("--time", help="time limit, as 12:00:00 (default: the partition's)")
    slurm.add_argument("--image", help="container image, for Pyxis (default: none, the environment of sbatch)")
    _add_workers(slurm)


def _add_gke(subparsers: Any, parsers: Mapping[str, argparse.ArgumentParser]) -> None:
    gke = add_command(
        subparsers, "gke", functools.partial(run_gke, parsers=parsers), accepts_overrides=True,
        summary="Print the JobSet of a training run on TPU slices on GKE, or the Job of data workers",
        details="Also prints the equivalent commands of xpk.\n"
        "With --workers, the data command after -- becomes an Indexed Job of independent workers: mplug2 launch gke "
        "--workers 64 --image REGISTRY/mplug2:1 -- data index gs://bucket/shards",
        example="mplug2 launch gke --config demo --topology v5p:4x4x4 --workdir gs://bucket/demo "
        "--image REGISTRY/mplug2:1",
    )  # fmt: skip
    _add_job_options(gke)
    gke.add_argument("--image", required=True, help="container image, built from launch/Dockerfile.tpu")
    gke.add_argument("--queue", help="local queue of Kueue (default: none, pods are created at once)")
    gke.add_argument("--namespace", help="Kubernetes namespace (default: kubectl's)")
    gke.add_argument(
        "--service-account", help="Kubernetes service account with write access to the bucket "
        "(default: the namespace's)",
    )  # fmt: skip
    gke.add_argument("--spot", action="store_true", help="use spot (preemptible) machines")
    gke.add_argument("--mount", help=_MOUNT_HELP)
    _add_min_slices(gke)
    gke.add_argument("--cluster", default="CLUSTER", help="name of the cluster, for xpk")
    _add_workers(gke)


def _add_tpu_vm(subparsers: Any) -> None:
    tpu_vm = add_command(
        subparsers, "tpu-vm", run_tpu_vm, accepts_overrides=True,
        summary="Print a script that trains on slices of the Cloud TPU service",
        details="The script requests slices until they are available, trains on all of their hosts, and requests them "
        "again after preemption.",
        example="mplug2 launch tpu-vm --config demo --topology v6e:4x4 --workdir gs://bucket/demo --zone us-east5-a "
        "--image REGISTRY/mplug2:1",
    )  # fmt: skip
    _add_job_options(tpu_vm)
    tpu_vm.add_argument("--image", required=True, help="container image, built from launch/Dockerfile.tpu")
    tpu_vm.add_argument("--zone", required=True, help="Google Cloud zone")
    tpu_vm.add_argument("--project", help="Google Cloud project (default: gcloud's)")
    tpu_vm.add_argument("--runtime-version", help="TPU runtime version (default: by chip)")
    tpu_vm.add_argument("--mount", help=_MOUNT_HELP)
    provisioning = tpu_vm.add_mutually_exclusive_group()
    provisioning.add_argument("--spot", action="store_true", help="use spot (preemptible) machines")
    provisioning.add_argument("--reserved", action="store_true", help="use a reservation")


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all schedulers."""
    parser.add_argument("--plan", type=to_path, help="plan.json of mplug2 plan: recipe, overrides and topology")
    parser.add_argument("--config", help="without --plan: recipe, as for mplug2 train")
    parser.add_argument("--topology", help="without --plan: topology, as v5p:8x8x8 or h100:64")
    parser.add_argument("--slices", type=int, help="without --plan: number of slices (default: 1)")
    parser.add_argument("--workdir", help="folder of the run, also gs://; resumes if it exists")
    parser.add_argument("--name", help="name of the job (default: the last part of --workdir)")
    parser.add_argument(
        "--grace-period", type=int, help="seconds from SIGTERM to SIGKILL, to save (default: 120; for spot pods: 15)"
    )
    parser.add_argument("--grace", dest="grace_period", type=int, help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    parser.add_argument("--max-restarts", type=int, default=100, help="restarts after failures (default: 100)")
    parser.add_argument("--out", type=to_path, help="write the file instead of printing it")
    parser.add_argument(
        "--submit", action="store_true", help="write the file (default: NAME and its extension) and submit it"
    )


def _add_min_slices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-slices", type=int, metavar="N",
        help="continue with N or more slices after a failure, in more micro-batches (default: wait for all of them)",
    )  # fmt: skip
    parser.add_argument(
        "--slice-timeout", type=int, metavar="SECONDS",
        help=f"with --min-slices: how long a start waits for all slices (default: {_SLICE_TIMEOUT})",
    )  # fmt: skip


def _parse_min_slices(args: argparse.Namespace, slices: int) -> tuple[int, int]:
    """Return how many of the slices suffice, and how long to wait for all of them. Raises UserError."""
    if args.min_slices is None:
        if args.slice_timeout is not None:
            raise UserError(f"--slice-timeout {args.slice_timeout} is not used without --min-slices: add it")
        return slices, _SLICE_TIMEOUT
    from mplug2_jax.parallel.config import elastic_slice_counts

    check_range("--min-slices", args.min_slices, 1, slices)
    check_range("--slice-timeout", args.slice_timeout, 1)
    if args.min_slices < slices and len(elastic_slice_counts(slices, args.min_slices)) == 1:
        *_, limit, _ = elastic_slice_counts(slices, 1)
        raise UserError(
            f"--min-slices {args.min_slices} of {slices} slices: a run continues with a number of slices that divides "
            f"{slices}; use at most {limit}"
        )
    return args.min_slices, args.slice_timeout or _SLICE_TIMEOUT


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, help="number of data workers, in place of a training run")
    parser.add_argument("--cpus", type=int, help="with --workers: CPUs of each worker (default: 4)")
    parser.add_argument("launched", nargs="*", metavar="COMMAND", help="with --workers, after --: the data command")


def run_local(args: argparse.Namespace, parsers: Mapping[str, argparse.ArgumentParser]) -> int:
    """Run the command as several processes and return its exit status.

    Args:
        args: of ``launch local``.
        parsers: the parsers of all commands, to check the launched command once, before any process starts.
    """
    from mplug2_jax.cli.train import resolve_recipe
    from mplug2_jax.launch.data_job import make_data_job
    from mplug2_jax.launch.local import LocalProcesses, SimulatedSlices

    for option, minimum in (("processes", 1), ("devices_per_process", 1), ("max_restarts", 0), ("slices", 1)):
        check_range(f"--{option.replace('_', '-')}", getattr(args, option), minimum)
    min_slices, timeout = _parse_min_slices(args, args.slices)
    if args.processes % args.slices:
        raise UserError(f"--slices {args.slices} with --processes {args.processes}: expected a multiple of the slices")
    command, *options = args.launched
    if command not in MULTIPROCESS_COMMANDS:
        raise UserError(
            f"{command!r} does not run on several processes: {did_you_mean(command, MULTIPROCESS_COMMANDS)}"
        )
    launched = parse_args(parsers[command], options)
    verbosity = {-1: ["--quiet"], 1: ["--verbose"]}.get(args.verbosity, [])
    words = [sys.executable, "-m", "mplug2_jax.cli.main", *verbosity, *args.launched]
    if args.slices > 1 and command != "train":
        raise UserError(f"--slices {args.slices} with {command}: only train has slices; remove the option")
    if command == "data":
        job = make_data_job(args.launched, launched, workers=args.processes)
        if status := LocalProcesses(words, args.processes, independent=True).run(args.max_restarts):
            return status
        joined = parse_args(parsers["data"], job.join_command[2:])
        return int(joined.run(joined))
    if command == "train":
        resolve_recipe(launched.config, launched.plan, launched.overrides)
    slices = SimulatedSlices(args.slices, min_slices, timeout) if args.slices > 1 else None
    return LocalProcesses(words, args.processes, args.devices_per_process, slices=slices).run(args.max_restarts)


def run_slurm(args: argparse.Namespace, parsers: Mapping[str, argparse.ArgumentParser]) -> int:
    """Print or submit the sbatch file."""
    from mplug2_jax.launch.slurm import SlurmOptions, render_slurm, render_slurm_array

    options = SlurmOptions(partition=args.partition, account=args.account, time=args.time, image=args.image)
    if job := _make_data_job(args, parsers):
        return _print_or_submit(render_slurm_array(job, options), args)
    return _print_or_submit(render_slurm(_make_job(args), options), args)


def run_gke(args: argparse.Namespace, parsers: Mapping[str, argparse.ArgumentParser]) -> int:
    """Print or apply the JobSet, or the Job of data workers."""
    from mplug2_jax.launch.gke import SPOT_GRACE_PERIOD, GkeOptions, render_gke, render_indexed_job

    options = GkeOptions(
        image=args.image, queue=args.queue, namespace=args.namespace, service_account=args.service_account,
        spot=args.spot, mount=args.mount, cluster=args.cluster,
    )  # fmt: skip
    if data_job := _make_data_job(args, parsers):
        return _print_or_submit(render_indexed_job(data_job, options), args)
    job = _make_job(args, SPOT_GRACE_PERIOD if args.spot else None)
    min_slices, timeout = _parse_min_slices(args, job.topology.slices)
    if min_slices < job.topology.slices:
        options = dataclasses.replace(options, min_slices=min_slices, slice_timeout=timeout)
    return _print_or_submit(render_gke(job, options), args)


def run_tpu_vm(args: argparse.Namespace) -> int:
    """Print or run the script."""
    from mplug2_jax.launch.tpu_vm import TpuVmOptions, render_tpu_vm

    options = TpuVmOptions(
        image=args.image, zone=args.zone, project=args.project, runtime=args.runtime_version, spot=args.spot,
        reserved=args.reserved, mount=args.mount,
    )  # fmt: skip
    return _print_or_submit(render_tpu_vm(_make_job(args), options), args)


_RUN_OPTIONS = ("plan", "config", "topology", "slices", "workdir", "grace_period", "min_slices")


def _make_data_job(args: argparse.Namespace, parsers: Mapping[str, argparse.ArgumentParser]) -> "DataJob | None":
    """Return the job of the data command after ``--``; None for a training run. Raises UserError."""
    from mplug2_jax.launch.data_job import make_data_job

    if args.workers is None and not args.launched:
        if args.cpus is not None:
            raise UserError(f"--cpus {args.cpus} is for data workers; set --workers too, or remove it")
        if args.workdir is None:
            raise UserError("--workdir is missing; give the folder of the run")
        return None
    if args.workers is None or args.launched[:1] != ["data"]:
        command = f"the command {' '.join(args.launched)!r}" if args.launched else "no command"
        workers = "no --workers" if args.workers is None else f"--workers {args.workers}"
        raise UserError(f"{workers} with {command}: expected both, as in --workers 64 -- data index gs://bucket/shards")
    given = [f"--{name.replace('_', '-')}" for name in _RUN_OPTIONS if getattr(args, name, None) is not None]
    given += args.overrides
    if given:
        raise UserError(f"{given[0]} is for training runs, and --workers starts data workers; remove one of them")
    data_args = parse_args(parsers["data"], args.launched[1:])
    return make_data_job(
        args.launched, data_args, workers=args.workers, cpus=4 if args.cpus is None else args.cpus, name=args.name,
        max_restarts=args.max_restarts, data_folder=os.environ.get("MPLUG2_DATA", ""),
    )  # fmt: skip


def _make_job(args: argparse.Namespace, default_grace_period: int | None = None) -> "Job":
    from mplug2_jax.launch.job import make_job, resolve_plan

    plan = resolve_plan(
        plan=args.plan, config=args.config, overrides=args.overrides, topology=args.topology, slices=args.slices
    )
    grace_period = default_grace_period if args.grace_period is None else args.grace_period
    return make_job(
        plan, workdir=args.workdir, name=args.name, grace_period=grace_period, max_restarts=args.max_restarts
    )


def _print_or_submit(submission: "Submission", args: argparse.Namespace) -> int:
    """Print or write the file, and print or run the command that submits it."""
    from mplug2_jax.launch.templates import quote_command

    path = args.out or Path(submission.filename)
    if args.out or args.submit:
        _write(submission.text, path)
        print(f"wrote {path}")
    else:
        print(submission.text)
    for note in submission.notes:
        print(f"# {' '.join(note.split())}")
    command = [*submission.command, str(path)]
    if args.submit:
        print(f"$ {quote_command(command)}", flush=True)
        return _run(command)
    print(f"# to submit (or use --submit):\n$ {quote_command(command)}")
    for title, commands in submission.alternatives:
        print("\n".join([f"\n# {title}:", *(f"$ {quote_command(words)}" for words in commands)]))
    return 0


def _write(text: str, path: Path) -> None:
    """Write the file; never overwrite a different one. Raises UserError."""
    if path.exists() and path.read_bytes() != text.encode():
        raise UserError(f"--out {path} exists with different content; choose another name, or remove it")
    path.write_text(text, encoding="utf-8")


def _run(command: list[str]) -> int:
    """Run the command and return its exit status. Raises UserError if it is not installed."""
    try:
        return subprocess.run(command).returncode
    except FileNotFoundError as error:
        raise UserError(
            f"{command[0]} is not installed on this machine; copy the file to one that has it, and submit it there"
        ) from error
