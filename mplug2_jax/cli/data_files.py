"""``mplug2 data show | validate | index | convert | chunk``: the commands that read and write data sets."""

import argparse
import collections
import dataclasses
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging as absl_logging

from data_pipelines.storage.paths import to_path
from mplug2_jax.cli.common import add_command
from mplug2_jax.cli.parsing import output_path
from mplug2_jax.console import Progress
from mplug2_jax.errors import UserError, check_range, did_you_mean

if TYPE_CHECKING:
    from data_pipelines.bad_records import BadRecord
    from data_pipelines.config import DataConfig, SourceConfig
    from data_pipelines.loader import ExampleBuilder
    from data_pipelines.record import Record, Source
    from data_pipelines.tokenizers import Tokenizer
    from data_pipelines.validate import ValidationReport
    from mplug2_jax.training.config import RunConfig

WORD_EDGES = (0, 1, 5, 10, 15, 20, 30, 50, 100, 500)
SECOND_EDGES = (0, 1, 2, 5, 10, 30, 60, 300, 3600)
MAX_PRINTED = 20
"""Bad records and duplicate keys that are printed."""
FORMAT_VERSION = 2
"""Of the output of ``validate --json``. Version 1 had no ``format_version``."""


def add_parsers(kinds: Any) -> None:
    """Add the sub-commands."""
    show = add_command(
        kinds, "show", run_show, config=True,
        summary="Write the batch that a step of a recipe trains on as a contact sheet",
        details="The sheet is an image and a page.",
        example="mplug2 data show demo --stream video_text --step 7 --out runs/sheets",
    )  # fmt: skip
    show.add_argument("recipe", metavar="RECIPE", help="a file, or the name of a shipped recipe")
    show.add_argument("--stream", help="name of a stream (default: all)")
    show.add_argument("--step", type=int, default=1, help="number of the step, from 1 (default: %(default)s)")
    show.add_argument("--out", type=output_path, default=Path(), metavar="DIR", help="output folder (default: here)")
    check = add_command(
        kinds, "validate", run_validate, config=True,
        summary="Read data as training does, and report unusable records",
        details="The last line is the result. Exit status 1: more unusable records than --max-bad-fraction.",
        example="mplug2 data validate 'webdataset:shards/{00000..00127}.tar' --kind image",
    )  # fmt: skip
    check.add_argument("spec", metavar="SPEC", help="FORMAT:PATH, or a recipe: its streams and evaluations")
    _add_source(check)
    check.add_argument(
        "--max-bad-fraction", type=float, default=0.0, metavar="FRACTION",
        help="fraction of a source's records that may be unusable, 0 to 1 (default: 0)",
    )  # fmt: skip
    check.add_argument(
        "--allow", dest="max_bad_fraction", type=float, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )  # its old name
    check.add_argument("--json", action="store_true", help="print the report as one JSON object")
    index = add_command(
        kinds, "index", run_index,
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
    index.add_argument("--workers", type=int, default=8, help="tars scanned at a time (default: %(default)s)")
    convert = add_command(
        kinds, "convert", run_convert,
        summary="Convert any source to ArrayRecord shards",
        details="Run it again to resume an interrupted conversion.",
        example="mplug2 data convert webdataset:shards --kind image --shards 64 --out records",
    )  # fmt: skip
    convert.add_argument("spec", metavar="FORMAT:PATH", help="source to convert")
    _add_source(convert)
    convert.add_argument("--out", type=output_path, required=True, metavar="DIR", help="output folder for the shards")
    convert.add_argument("--shards", type=int, default=1, help="number of files (default: %(default)s)")
    convert.add_argument("--workers", type=int, default=2, help="files written at a time (default: %(default)s)")
    chunk = add_command(
        kinds, "chunk", run_chunk,
        summary="Cut text files into records of a fixed number of tokens",
        details="The records are for a text stream.",
        example="mplug2 data chunk wiki.txt --tokenizer vocab.txt --length 512 --out wiki.array_record",
    )  # fmt: skip
    chunk.add_argument("texts", nargs="+", type=to_path, metavar="FILE", help="text files in UTF-8")
    chunk.add_argument(
        "--tokenizer", type=to_path, required=True, metavar="PATH", help="vocab.txt or *.model, or its folder"
    )
    chunk.add_argument("--length", type=int, default=512, help="tokens per record (default: %(default)s)")
    chunk.add_argument("--out", type=output_path, required=True, metavar="FILE", help="new *.array_record file")


def _add_source(parser: argparse.ArgumentParser) -> None:
    """Add the options of a source given as FORMAT:PATH; a recipe sets its own."""
    parser.add_argument("--kind", choices=("image", "video", "text"), default="image", help="(default: %(default)s)")
    parser.add_argument(
        "--media", default="", metavar="DIR", help="folder of the media of annotations (default: that of the file)"
    )
    parser.add_argument("--split", default="", help="split to read, where the files name splits")
    parser.add_argument("--max-records", type=int, help="read only the first records")
    parser.add_argument(
        "--size", dest="max_records", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )  # its old name


def _source_config(args: argparse.Namespace) -> "SourceConfig":
    from data_pipelines.sources.formats import parse_spec

    return parse_spec(args.spec, kind=args.kind, media=args.media, split=args.split, max_records=args.max_records)


def run_show(args: argparse.Namespace) -> int:
    """Write STREAM-stepN.html, and .png if there are images; never over existing files."""
    from mplug2_jax.config import build, load_recipe
    from mplug2_jax.training.config import RunConfig

    if args.step < 1:
        raise UserError(f"--step {args.step} should be at least 1, the first step")
    config = build(RunConfig, load_recipe(args.recipe, args.overrides))
    if args.stream and args.stream not in config.streams:
        raise UserError(f"--stream {args.stream} is not in the recipe: {did_you_mean(args.stream, config.streams)}")
    for name in [args.stream] if args.stream else config.streams:
        for path in _show(config, name, args.step, args.out):
            print(path)
    return 0


def _show(config: "RunConfig", name: str, step: int, folder: Path) -> "list[Path]":
    from data_pipelines.loader import Stream
    from mplug2_jax.report.contact_sheet import write_contact_sheet
    from mplug2_jax.training.workdir import load_or_train_tokenizer

    stream = Stream(config.streams[name].data, load_or_train_tokenizer(config.tokenizer), name=name, seed=config.seed)
    return write_contact_sheet(folder / f"{name}-step{step}", name, step, stream.batch(step - 1))


def run_validate(args: argparse.Namespace) -> int:
    """Print the reports; return 1 if more of a source is unusable than allowed."""
    from data_pipelines.sources.formats import FORMATS
    from data_pipelines.validate import validate

    check_range("--max-bad-fraction", args.max_bad_fraction, 0, 1)
    recipe = args.spec.partition(":")[0] not in FORMATS
    if args.overrides and not recipe:
        raise UserError(f"{args.overrides[0]} is for recipes, and {args.spec} is not one; use --kind, --media, --split")
    reports: list[_SourceReport] = []
    for prefix, data, builder, warnings in _recipe_data(args) if recipe else _single_source(args):
        for name, source in data.sources.items():
            with Progress(len(builder.sources[name]), "record", desc=f"{prefix}{name}") as progress:
                report = validate(builder, name, views=data.visual.views, on_progress=progress.update)
            changed = _changed_shards(source.path) if source.format == "array_record" else []
            reports.append(_SourceReport(f"{prefix}{name}", report, warnings, changed))
            warnings = []  # those of opening the sources are reported once
            if not args.json:
                print(reports[-1].text(), flush=True)
    records = sum(source.report.records for source in reports)
    errors = sum((source.report.errors for source in reports), collections.Counter[str]())
    failed = [source.name for source in reports if source.failed(args.max_bad_fraction)]
    if args.json:
        content = {
            "format_version": FORMAT_VERSION, "records": records, "usable": records - errors.total(), "errors": errors,
            "max_bad_fraction": args.max_bad_fraction, "failed": failed,
            "sources": [source.to_json() for source in reports],
        }  # fmt: skip
        print(json.dumps(content, indent=1))
    else:
        errors["changed files"] = sum(len(source.changed_files) for source in reports)
        causes = ", ".join(f"{count:,} {cause}" for cause, count in errors.items() if count)
        unusable = sum(source.report.errors.total() for source in reports)
        result = f"{unusable:,} of {records:,} records unusable: {causes}"
        noted = "; warnings above" if any(source.warnings for source in reports) else ""
        print(f"{result if causes else f'OK: all {records:,} records are usable'}{noted}")
    return 1 if failed else 0


@dataclasses.dataclass(frozen=True)
class _SourceReport:
    """The validation of one source."""

    name: str
    report: "ValidationReport"
    warnings: Sequence[str]  # on opening it
    changed_files: Sequence[str]  # files that do not match their checksums

    def failed(self, max_bad_fraction: float) -> bool:
        """Return whether more records are unusable than allowed, or a file changed."""
        return bool(self.changed_files) or self.report.errors.total() > max_bad_fraction * self.report.records

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        report = self.report
        bad_records = [{"key": record.key, "reason": record.reason} for record in report.bad_records]
        return {
            "name": self.name, "records": report.records, "usable": report.usable, "images": report.images,
            "videos": report.videos, "errors": report.errors, "bad_records": bad_records,
            "duplicate_keys": report.duplicate_keys, "warnings": self.warnings, "changed_files": self.changed_files,
        }  # fmt: skip

    def text(self) -> str:
        """Return the report as text."""
        from data_pipelines.validate import histogram

        report = self.report
        lines = [f"{report.records:,} records, {report.images:,} encoded images, {report.videos:,} encoded videos"]
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines += [f"{count:,} {cause}" for cause, count in report.errors.items()]
        lines += [f"  {record.key}: {record.reason}" for record in report.bad_records[:MAX_PRINTED]]
        if report.errors.total() > MAX_PRINTED:
            lines.append(f"  and {report.errors.total() - MAX_PRINTED:,} more")
        if report.duplicate_keys:
            keys = ", ".join(report.duplicate_keys[:MAX_PRINTED])
            lines.append(f"{len(report.duplicate_keys):,} keys shared by several records: {keys}")
        for file in self.changed_files:
            lines.append(f"{file} has changed: its sha256 differs from that in its manifest; convert it again")
        for title, values, edges, unit in (
            ("text lengths", report.text_lengths, WORD_EDGES, "words"),
            ("video durations", report.video_seconds, SECOND_EDGES, "s"),
        ):
            if values:
                lines += [f"{title}:", *(f"  {bar}" for bar in histogram(values, edges, unit).splitlines())]
        return "\n".join([_printable(self.name), *(f"  {_printable(line)}" for line in lines)])


def _printable(text: str) -> str:
    """Return a text with control characters escaped, and those that a terminal cannot encode."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _changed_shards(path: str) -> list[str]:
    """Return the files that do not match the checksums of their manifests; files without a manifest are skipped."""
    from data_pipelines.convert import check_shard
    from data_pipelines.sources.array_record import SUFFIX
    from data_pipelines.sources.files import find_files

    return [file.path for file in find_files(path, SUFFIX) if check_shard(to_path(file.path)) is False]


DataSet = tuple[str, "DataConfig", "ExampleBuilder", list[str]]
"""A prefix for the sources' names, the sources, the builder of their examples, and the warnings of opening them."""


def _single_source(args: argparse.Namespace) -> Iterator[DataSet]:
    from data_pipelines.config import DataConfig, ExampleConfig
    from data_pipelines.tokenizers import SPECIAL_TOKENS, WordPieceTokenizer

    data = DataConfig(sources={args.spec: _source_config(args)}, examples=ExampleConfig(), batch_size=1)
    # The examples have no texts, so the tokenizer is not used.
    yield "", data, *_open_builder(data, WordPieceTokenizer(SPECIAL_TOKENS), args.spec, 0)


def _open_builder(
    data: "DataConfig", tokenizer: "Tokenizer", name: str, seed: int, min_answers: int = 0
) -> "tuple[ExampleBuilder, list[str]]":
    """Return the builder of the examples, and the warnings of opening its sources."""
    from data_pipelines.loader import ExampleBuilder

    warnings, logger = list[str](), absl_logging.get_absl_logger()

    def collect(record: logging.LogRecord) -> bool:
        """Collect a warning instead of logging it."""
        if record.levelno == logging.WARNING:
            warnings.append(record.getMessage())
        return record.levelno != logging.WARNING

    logger.addFilter(collect)
    try:
        return ExampleBuilder(data, tokenizer, name, seed, min_answers=min_answers), warnings
    finally:
        logger.removeFilter(collect)


def _recipe_data(args: argparse.Namespace) -> Iterator[DataSet]:
    """Yield the streams of a recipe and its evaluations, in order."""
    from data_pipelines.sources.formats import parse_spec
    from mplug2_jax.config import build, find_recipe, load_recipe
    from mplug2_jax.tasks.contracts import CONTRACTS
    from mplug2_jax.training.config import RunConfig
    from mplug2_jax.training.workdir import load_or_train_tokenizer

    try:
        find_recipe(args.spec.partition(":")[0])
    except UserError as error:
        if ":" in args.spec:
            parse_spec(args.spec)  # raises an error with the valid formats
        raise UserError(f"{error}; data without a recipe are given as FORMAT:PATH") from error
    config: RunConfig = build(RunConfig, load_recipe(args.spec, args.overrides))
    tokenizer = load_or_train_tokenizer(config.tokenizer)
    data_sets = [(f"{name}/", name, stream.data, 0) for name, stream in config.streams.items()] + [
        (f"evaluations/{name}/", name, evaluation.data, CONTRACTS[evaluation.task].min_answers)
        for name, evaluation in config.evaluations.items()
    ]
    for prefix, name, data, min_answers in data_sets:
        yield prefix, data, *_open_builder(data, tokenizer, name, config.seed, min_answers)


def run_index(args: argparse.Namespace) -> int:
    """Write the indexes, and print how many samples they have."""
    from data_pipelines.sources.files import find_files
    from data_pipelines.sources.indexed_tars import TarSet

    if args.workers < 1:
        raise UserError(f"--workers {args.workers} should be at least 1")
    if args.index:
        to_path(args.index)  # raises an error for an impossible one
    files = find_files(args.path.removeprefix("webdataset:"), ".tar")
    tars = TarSet(files, args.index)
    scanned = tars.missing
    with Progress(sum(file.size for file in scanned), "B", desc="scanning") as progress:
        tars.build(workers=args.workers, must_write=True, on_progress=progress.update)
    if len(files) > 1 and not tars.is_merged:
        tars.merge()
    samples = sum(map(len, tars.tars))
    path = tars.merged_path if tars.is_merged else tars.index_path(files[0])
    print(f"{path}: {samples:,} samples in {len(files):,} tar{'s' * (len(files) != 1)}; {len(scanned):,} scanned, "
          f"{len(files) - len(scanned):,} up to date")  # fmt: skip
    return 0


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
    from data_pipelines.convert import convert
    from data_pipelines.sources.formats import open_source

    if args.workers < 1:
        raise UserError(f"--workers {args.workers} should be at least 1")
    config = _source_config(args)
    source, settings = open_source(config, VisualConfig()), config.identity()
    num_records, bad_records = 0, list["BadRecord"]()
    with Progress(len(source), "record", desc="converting") as progress:
        for path, manifest in convert(
            _CountingSource(source, progress), settings, args.out, shards=args.shards, workers=args.workers
        ):
            summary = f"{manifest.records:,} records, {manifest.bytes:,} bytes, sha256 {manifest.sha256[:12]}"
            print(f"{path}: {summary}", flush=True)
            num_records, bad_records = num_records + manifest.records, [*bad_records, *manifest.bad_records]
    print(f"{num_records:,} records in {args.shards:,} shards")
    for record in bad_records[:MAX_PRINTED]:
        print(f"skipped: {record.key}: {record.reason}")
    if len(bad_records) > MAX_PRINTED:
        print(f"skipped: {len(bad_records) - MAX_PRINTED:,} more; the .json files of the shards list them")
    return 1 if bad_records else 0


def run_chunk(args: argparse.Namespace) -> int:
    """Write the file, and print its number of records."""
    from data_pipelines.corpus import write_corpus
    from data_pipelines.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    with Progress(sum(path.stat().st_size for path in args.texts), "B", desc="chunking") as progress:
        count = write_corpus(args.texts, tokenizer, args.length, args.out, progress.update)
    print(f"{args.out}: {count:,} records of {args.length} tokens")
    return 0
