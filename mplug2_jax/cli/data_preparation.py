"""``mplug2 data index | convert | chunk``: the commands that write files to train from."""

import argparse
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.storage.paths import to_path
from mplug2_jax.cli.common import add_command
from mplug2_jax.cli.data_files import add_source, add_worker, parse_worker_option, print_skipped, source_config
from mplug2_jax.cli.parsing import output_path
from mplug2_jax.console import Progress
from mplug2_jax.errors import UserError

if TYPE_CHECKING:
    from data_pipelines.bad_records import BadRecord
    from data_pipelines.preparation.shards import ShardManifest
    from data_pipelines.record import Record, Source


def add_parsers(subparsers: Any) -> None:
    """Add the sub-commands."""
    index = add_command(
        subparsers, "index", run_index,
        summary="Index WebDataset tars once, for all hosts and runs",
        details="Scans tars that are new or changed, and merges all indexes into one file that opens in seconds. Run "
        "it again to resume, or after changes.",
        example="mplug2 data index 'gs://my-bucket/laion/{00000..00127}.tar' --index gs://my-bucket/indexes",
    )  # fmt: skip
    index.add_argument("path", metavar="PATH", help="a tar, a folder of tars, or a pattern, as in a source's path")
    index.add_argument(
        "--index", default="", metavar="DIR",
        help="folder for the indexes, which sources name in their field 'index' (default: next to the tars)",
    )  # fmt: skip
    _add_threads(index, 8, "tars scanned at a time")
    add_worker(index)
    convert = add_command(
        subparsers, "convert", run_convert,
        summary="Convert any source to ArrayRecord shards",
        details="Run it again to resume an interrupted conversion.",
        example="mplug2 data convert webdataset:shards --kind image --shards 64 --out records",
    )  # fmt: skip
    convert.add_argument("spec", metavar="FORMAT:PATH", help="source to convert")
    add_source(convert)
    convert.add_argument("--out", type=output_path, required=True, metavar="DIR", help="output folder for the shards")
    convert.add_argument("--shards", type=int, default=1, help="number of files (default: %(default)s)")
    _add_threads(convert, 2, "files written at a time")
    add_worker(convert)
    chunk = add_command(
        subparsers, "chunk", run_chunk,
        summary="Cut text files into records of a fixed number of tokens",
        details="The records are for a text stream.",
        example="mplug2 data chunk wiki.txt --tokenizer vocab.txt --length 512 --out wiki.array_record",
    )  # fmt: skip
    chunk.add_argument("texts", nargs="+", type=to_path, metavar="FILE", help="text files in UTF-8")
    chunk.add_argument(
        "--tokenizer", type=to_path, required=True, metavar="PATH", help="vocab.txt or *.model, or its folder"
    )
    chunk.add_argument("--length", type=int, default=512, help="tokens per record (default: %(default)s)")
    chunk.add_argument(
        "--out", type=output_path, required=True, metavar="PATH", help="new *.array_record file, or folder for shards"
    )
    chunk.add_argument("--shards", type=int, default=1, help="number of files in a folder (default: %(default)s)")
    add_worker(chunk)


def _add_threads(parser: argparse.ArgumentParser, default: int, what: str) -> None:
    parser.add_argument("--num-threads", type=int, default=default, help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--workers", dest="num_threads", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )  # its old name


def run_index(args: argparse.Namespace) -> int:
    """Write the indexes, and print how many samples they have."""
    from data_pipelines.sources.files import find_files
    from data_pipelines.sources.indexed_tars import TarSet

    _check_threads(args)
    if args.index:
        to_path(args.index)  # raises an error for an impossible one
    files = find_files(args.path.removeprefix("webdataset:"), ".tar")
    tars, worker = TarSet(files, args.index), parse_worker_option(args)
    share = worker.select_share(files)
    missing = {file.path for file in tars.missing}
    scanned = [file for file in share if file.path in missing]
    with Progress(sum(file.size for file in scanned), "B", desc="scanning") as progress:
        tars.build(scanned, num_threads=args.num_threads, must_write=True, on_progress=progress.update)
    done = f"{len(scanned):,} scanned, {len(share) - len(scanned):,} up to date"
    if args.worker:
        print(f"worker {args.worker}: {len(share):,} of {len(files):,} tars; {done}")
        return 0
    if len(files) > 1 and not tars.is_merged:
        tars.merge()
    samples = sum(map(len, tars.tars))
    path = tars.merged_path if tars.is_merged else tars.index_path(files[0])
    print(f"{path}: {samples:,} samples in {len(files):,} tar{'s' * (len(files) != 1)}; {done}")
    return 0


def _check_threads(args: argparse.Namespace) -> None:
    if args.num_threads < 1:
        raise UserError(f"--num-threads {args.num_threads} should be at least 1")


class _CountingSource:
    """A source that shows how many of its records were read."""

    def __init__(self, source: "Source", progress: Progress) -> None:
        self._source, self._progress, self._lock, self._done = source, progress, threading.Lock(), 0

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> "Record":
        try:
            return self._source[index]
        finally:
            with self._lock:
                self._done += 1
                self._progress.update(self._done)


def run_convert(args: argparse.Namespace) -> int:
    """Write the shards, and print a line for each; return 1 if records were skipped."""
    from data_pipelines.config import VisualConfig
    from data_pipelines.preparation.convert import convert
    from data_pipelines.sources.formats import open_source

    _check_threads(args)
    config, worker = source_config(args), parse_worker_option(args)
    source, settings = open_source(config, VisualConfig()), config.identity()
    with Progress(-(-len(source) // worker.count), "record", desc="converting") as progress:
        shards = convert(
            _CountingSource(source, progress), settings, args.out, shards=args.shards, num_threads=args.num_threads,
            worker=worker,
        )  # fmt: skip
        bad_records = _print_shards(shards, args)
    return 1 if bad_records and not args.worker else 0


def _print_shards(shards: "Iterator[tuple[Path, ShardManifest]]", args: argparse.Namespace) -> int:
    """Print a line for each shard, the number of records, and the records that were skipped; return their number."""
    num_records, bad_records = 0, list["BadRecord"]()
    for path, manifest in shards:
        summary = f"{manifest.records:,} records, {manifest.bytes:,} bytes, sha256 {manifest.sha256[:12]}"
        print(f"{path}: {summary}", flush=True)
        num_records, bad_records = num_records + manifest.records, [*bad_records, *manifest.bad_records]
    print(f"{num_records:,} records in {args.shards:,} shards" if not args.worker else
          f"worker {args.worker}: {num_records:,} records")  # fmt: skip
    print_skipped(bad_records)
    return len(bad_records)


def run_chunk(args: argparse.Namespace) -> int:
    """Write the file or the shards, and print the number of records."""
    from data_pipelines.preparation.corpus import write_corpus, write_corpus_shards
    from data_pipelines.sources.array_record import SUFFIX
    from data_pipelines.tokenizers import load_tokenizer

    tokenizer, worker = load_tokenizer(args.tokenizer), parse_worker_option(args)
    is_file = args.out.suffix == SUFFIX
    if is_file and (args.worker or args.shards != 1):
        option = f"--worker {args.worker}" if args.worker else f"--shards {args.shards}"
        raise UserError(f"{option} with --out {args.out}: shards are written into a folder; give its name")
    size = sum(path.stat().st_size for path in args.texts)
    with Progress(-(-size // worker.count), "B", desc="chunking") as progress:
        if is_file:
            count = write_corpus(args.texts, tokenizer, args.length, args.out, progress.update)
        else:
            shards = write_corpus_shards(
                args.texts, tokenizer, args.length, args.out, shards=args.shards, worker=worker,
                on_progress=progress.update,
            )  # fmt: skip
            _print_shards(shards, args)
    if is_file:
        print(f"{args.out}: {count:,} records of {args.length} tokens")
    return 0
