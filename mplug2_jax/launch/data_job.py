"""Jobs that prepare data: independent workers of one ``mplug2 data`` command, and the command that joins their work."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence

from mplug2_jax.errors import UserError, check_range, did_you_mean
from mplug2_jax.launch.job import make_job_name

DATA_COMMANDS = ("convert", "validate", "index", "chunk")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataJob:
    """A data command, and its workers."""

    words: tuple[str, ...]  # of the command, after "mplug2"
    out: str  # folder that the workers write; of an index: the folder of the tars, or of their indexes
    workers: int
    cpus: int  # of each worker
    name: str
    max_restarts: int  # of each worker
    input_paths: Mapping[str, str] = dataclasses.field(default_factory=dict)  # what names each path
    data_folder: str = ""  # $MPLUG2_DATA of this machine

    @property
    def command(self) -> list[str]:
        """Return the command of all work; a worker's has the option ``--worker`` too."""
        return ["mplug2", *self.words]

    @property
    def join_command(self) -> list[str]:
        """Return the command that joins what the workers did."""
        return self.command if self.words[1] == "index" else ["mplug2", "data", "summary", self.out]


def make_data_job(
    words: Sequence[str],
    args: argparse.Namespace,
    *,
    workers: int,
    cpus: int = 1,
    name: str | None = None,
    max_restarts: int = 0,
    data_folder: str = "",
) -> DataJob:
    """Check a command for many workers.

    Args:
        words: of the command, beginning with "data".
        args: the parsed words.
        workers: number of workers.
        cpus: of each worker.
        name: of the job; None: the last part of the output folder.
        max_restarts: of each worker.
        data_folder: $MPLUG2_DATA.

    Raises:
        UserError: the command does not take workers, writes into no folder, or an option is out of range.
    """
    for option, value, minimum in (("--workers", workers, 1), ("--cpus", cpus, 1), ("--max-restarts", max_restarts, 0)):
        check_range(option, value, minimum)
    if args.subcommand not in DATA_COMMANDS:
        raise UserError(
            f"data {args.subcommand} does not run on several workers: {did_you_mean(args.subcommand, DATA_COMMANDS)}"
        )
    if args.worker:
        raise UserError(f"--worker {args.worker}: mplug2 launch sets it; remove it")
    if args.subcommand == "validate":
        inputs = {args.spec.partition(":")[2] or args.spec: args.spec, args.media: "--media"}
    elif args.subcommand == "convert":
        inputs = {args.spec.partition(":")[2]: args.spec, args.media: "--media"}
    elif args.subcommand == "index":
        inputs = {args.path: "PATH"}
    else:
        inputs = {**{str(path): "FILE" for path in args.texts}, str(args.tokenizer): "--tokenizer"}
    out = args.index or args.path if args.subcommand == "index" else str(args.out or "")
    if not out or out.endswith(".array_record"):
        found = f"--out {out}" if out else "no --out"
        raise UserError(f"data {args.subcommand} for several workers: expected --out DIR, found {found}")
    files = {"convert": getattr(args, "shards", 0), "chunk": getattr(args, "shards", 0)}.get(args.subcommand)
    if files is not None and files < workers:
        raise UserError(
            f"--workers {workers} with --shards {files}: some workers would have nothing to do; expected at least "
            f"{workers} shards"
        )
    return DataJob(
        words=tuple(words), out=out, workers=workers, cpus=cpus, name=make_job_name(name, out),
        max_restarts=max_restarts, input_paths={path: option for path, option in inputs.items() if path},
        data_folder=data_folder,
    )  # fmt: skip
