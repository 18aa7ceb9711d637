"""``mplug2 data show | validate | summary``: the commands that read data sets, and what workers wrote."""

import argparse
import collections
import dataclasses
import json
import logging
from collections.abc import Iterator
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
    from data_pipelines.preparation.jobs import Worker
    from data_pipelines.preparation.validate import SourceChecks, ValidationReport
    from data_pipelines.tokenizers import Tokenizer
    from mplug2_jax.training.config import RunConfig

WORD_EDGES = (0, 1, 5, 10, 15, 20, 30, 50, 100, 500)
SECOND_EDGES = (0, 1, 2, 5, 10, 30, 60, 300, 3600)
MAX_PRINTED = 20
"""Bad records and duplicate keys that are printed."""
FORMAT_VERSION = 2
"""Of the output of ``validate --json``. Version 1 had no ``format_version``."""


def add_parsers(subparsers: Any) -> None:
    """Add the sub-commands."""
    show = add_command(
        subparsers, "show", run_show, accepts_overrides=True,
        summary="Write the batch that a step of a recipe trains on as a contact sheet",
        details="The sheet is an image and a page.",
        example="mplug2 data show demo --stream video_text --step 7 --out runs/sheets",
    )  # fmt: skip
    show.add_argument("recipe", metavar="RECIPE", help="a file, or the name of a shipped recipe")
    show.add_argument("--stream", help="name of a stream (default: all)")
    show.add_argument("--step", type=int, default=1, help="number of the step, from 1 (default: %(default)s)")
    show.add_argument("--out", type=output_path, default=Path(), metavar="DIR", help="output folder (default: here)")
    check = add_command(
        subparsers, "validate", run_validate, accepts_overrides=True,
        summary="Read data as training does, and report unusable records",
        details="The last line is the result. Exit status 1: more unusable records than --max-bad-fraction.",
        example="mplug2 data validate 'webdataset:shards/{00000..00127}.tar' --kind image",
    )  # fmt: skip
    check.add_argument("spec", metavar="SPEC", help="FORMAT:PATH, or a recipe: its streams and evaluations")
    add_source(check)
    _add_max_bad_fraction(check)
    check.add_argument(
        "--allow", dest="max_bad_fraction", type=float, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )  # its old name
    check.add_argument("--json", action="store_true", help="print the report as one JSON object")
    check.add_argument("--out", type=output_path, metavar="DIR", help="with --worker: folder for what workers find")
    add_worker(check)
    summary = add_command(
        subparsers, "summary", run_summary,
        summary="Join what the workers of data convert, chunk or validate wrote into a folder",
        details="The last line is the result. Exit status 1: a file is missing, records were skipped, or more of a "
        "validated source is unusable than --max-bad-fraction.",
        example="mplug2 data summary gs://my-bucket/records",
    )  # fmt: skip
    summary.add_argument("folder", type=to_path, metavar="DIR", help="output folder of the workers")
    _add_max_bad_fraction(summary)
    summary.add_argument("--json", action="store_true", help="print the report as one JSON object")


def add_worker(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--worker``."""
    parser.add_argument(
        "--worker", metavar="INDEX/COUNT", help="do one of COUNT shares of the work, as 0/64; mplug2 launch sets it "
        "(default: all of it)",
    )  # fmt: skip


def _add_max_bad_fraction(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.0, metavar="FRACTION",
        help="fraction of a source's records that may be unusable, 0 to 1 (default: 0)",
    )  # fmt: skip


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add the options of a source given as FORMAT:PATH; a recipe sets its own."""
    parser.add_argument("--kind", choices=("image", "video", "text"), default="image", help="(default: %(default)s)")
    parser.add_argument(
        "--media", default="", metavar="DIR",
        help="folder of the media of annotations (default: the annotation file's folder)",
    )  # fmt: skip
    parser.add_argument("--split", default="", help="split to read, where the files name splits")
    parser.add_argument("--max-records", type=int, help="read only the first records")
    parser.add_argument(
        "--size", dest="max_records", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )  # its old name


def source_config(args: argparse.Namespace) -> "SourceConfig":
    """Return the source that FORMAT:PATH and the options of ``add_source`` describe."""
    from data_pipelines.sources.formats import parse_spec

    return parse_spec(args.spec, kind=args.kind, media=args.media, split=args.split, max_records=args.max_records)


def run_show(args: argparse.Namespace) -> int:
    """Write STREAM-stepN.html, and .png if there are images; never over existing files."""
    from mplug2_jax.training.durations import load_run_config

    if args.step < 1:
        raise UserError(f"--step {args.step} should be at least 1, the first step")
    config = load_run_config(args.recipe, args.overrides)
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


def parse_worker_option(args: argparse.Namespace) -> "Worker":
    """Return the worker that ``--worker`` names; without it, the only one."""
    from data_pipelines.preparation.jobs import SINGLE_WORKER, parse_worker

    return parse_worker(args.worker) if args.worker else SINGLE_WORKER


def run_validate(args: argparse.Namespace) -> int:
    """Print the reports; return 1 if more of a source is unusable than allowed."""
    from data_pipelines.preparation.validate import SourceChecks, validate
    from data_pipelines.sources.formats import FORMATS

    check_range("--max-bad-fraction", args.max_bad_fraction, 0, 1)
    if bool(args.worker) != bool(args.out):
        raise UserError("--worker and --out need each other: workers write into a folder, which data summary reads")
    if args.worker and (args.json or args.max_bad_fraction):
        option = "--json" if args.json else f"--max-bad-fraction {args.max_bad_fraction}"
        raise UserError(f"{option} with --worker {args.worker}: give it to data summary, which joins what workers find")
    worker = parse_worker_option(args)
    recipe = args.spec.partition(":")[0] not in FORMATS
    if args.overrides and not recipe:
        raise UserError(f"{args.overrides[0]} is for recipes, and {args.spec} is not one; use --kind, --media, --split")
    sources = (
        SourceChecks(builder, name, source, f"{prefix}{name}", data.visual.views, warnings if name == first else ())
        for prefix, data, builder, warnings in (_recipe_data(args) if recipe else _single_source(args))
        for first in [next(iter(data.sources))]  # the warnings of opening the sources are reported once
        for name, source in data.sources.items()
    )
    if args.worker:
        return _validate_share(list(sources), worker, args)
    reports: list[_SourceReport] = []
    for checks in sources:
        with Progress(len(checks.source), "record", desc=checks.title) as progress:
            reports.append(_SourceReport(checks.title, validate(checks, progress.update)))
        if not args.json:
            print(reports[-1].text(), flush=True)
    return _print_result(reports, args)


def _validate_share(sources: "list[SourceChecks]", worker: "Worker", args: argparse.Namespace) -> int:
    from data_pipelines.preparation.validate import count_share, validate_share

    names = ("spec", "kind", "media", "split", "max_records", "overrides")
    records = count_share(sources, worker)
    with Progress(records, "record", desc="validating") as progress:
        validate_share(sources, {name: getattr(args, name) for name in names}, args.out, worker, progress.update)
    print(f"{args.out}: worker {args.worker} checked {records:,} records")
    return 0


def _print_result(reports: "list[_SourceReport]", args: argparse.Namespace) -> int:
    """Print the reports as JSON, or the line about all of them; return 1 if more is unusable than allowed."""
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
        errors["changed files"] = sum(len(source.report.changed_files) for source in reports)
        causes = ", ".join(f"{count:,} {cause}" for cause, count in errors.items() if count)
        unusable = sum(source.report.errors.total() for source in reports)
        result = f"{unusable:,} of {records:,} records unusable: {causes}"
        noted = "; warnings above" if any(source.report.warnings for source in reports) else ""
        print(f"{result if causes else f'OK: all {records:,} records are usable'}{noted}")
    return 1 if failed else 0


@dataclasses.dataclass(frozen=True)
class _SourceReport:
    """The validation of one source."""

    name: str
    report: "ValidationReport"

    def failed(self, max_bad_fraction: float) -> bool:
        """Return whether more records are unusable than allowed, or a file changed."""
        report = self.report
        return bool(report.changed_files) or report.errors.total() > max_bad_fraction * report.records

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        report = self.report
        bad_records = [{"key": record.key, "reason": record.reason} for record in report.bad_records]
        return {
            "name": self.name, "records": report.records, "usable": report.usable, "images": report.images,
            "videos": report.videos, "errors": report.errors, "bad_records": bad_records,
            "duplicate_keys": report.duplicate_keys, "warnings": report.warnings, "changed_files": report.changed_files,
        }  # fmt: skip

    def text(self) -> str:
        """Return the report as text."""
        from data_pipelines.preparation.validate import histogram

        report = self.report
        lines = [f"{report.records:,} records, {report.images:,} encoded images, {report.videos:,} encoded videos"]
        lines += [f"warning: {warning}" for warning in report.warnings]
        lines += [f"{count:,} {cause}" for cause, count in report.errors.items()]
        lines += [f"  {record.key}: {record.reason}" for record in report.bad_records[:MAX_PRINTED]]
        if report.errors.total() > MAX_PRINTED:
            lines.append(f"  and {report.errors.total() - MAX_PRINTED:,} more")
        if report.duplicate_keys:
            keys = ", ".join(report.duplicate_keys[:MAX_PRINTED])
            lines.append(f"{len(report.duplicate_keys):,} keys shared by several records: {keys}")
        for file in report.changed_files:
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


DataSet = tuple[str, "DataConfig", "ExampleBuilder", list[str]]
"""A prefix for the sources' names, the sources, the builder of their examples, and the warnings of opening them."""


def _single_source(args: argparse.Namespace) -> Iterator[DataSet]:
    from data_pipelines.config import DataConfig, ExampleConfig
    from data_pipelines.tokenizers import SPECIAL_TOKENS, WordPieceTokenizer

    data = DataConfig(sources={args.spec: source_config(args)}, examples=ExampleConfig(), batch_size=1)
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
    from mplug2_jax.config import find_recipe
    from mplug2_jax.tasks.specs import TASK_SPECS
    from mplug2_jax.training.durations import load_run_config
    from mplug2_jax.training.workdir import load_or_train_tokenizer

    try:
        find_recipe(args.spec.partition(":")[0])
    except UserError as error:
        if ":" in args.spec:
            parse_spec(args.spec)  # raises an error with the valid formats
        raise UserError(f"{error}; data without a recipe are given as FORMAT:PATH") from error
    config = load_run_config(args.spec, args.overrides)
    tokenizer = load_or_train_tokenizer(config.tokenizer)
    data_sets = [(f"{name}/", name, stream.data, 0) for name, stream in config.streams.items()] + [
        (f"evaluations/{name}/", name, evaluation.data, TASK_SPECS[evaluation.task].min_answers)
        for name, evaluation in config.evaluations.items()
    ]
    for prefix, name, data, min_answers in data_sets:
        yield prefix, data, *_open_builder(data, tokenizer, name, config.seed, min_answers)


def print_skipped(bad_records: "list[BadRecord]") -> None:
    """Print the first records that were skipped, and why."""
    for record in bad_records[:MAX_PRINTED]:
        print(f"skipped: {record.key}: {record.reason}")
    if len(bad_records) > MAX_PRINTED:
        print(f"skipped: {len(bad_records) - MAX_PRINTED:,} more; the .json files of the shards list them")


def run_summary(args: argparse.Namespace) -> int:
    """Print what all workers of a folder did; return 1 if something is missing or unusable."""
    from data_pipelines.preparation.jobs import read_job
    from data_pipelines.preparation.shards import summarize_shards
    from data_pipelines.preparation.validate import read_reports

    check_range("--max-bad-fraction", args.max_bad_fraction, 0, 1)
    try:
        job = read_job(args.folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{args.folder} has no job.json: expected the --out folder of data convert, chunk or validate with --worker"
        ) from error
    if job.command == "validate":
        reports = [_SourceReport(name, report) for name, report in read_reports(args.folder).items()]
        if not args.json:
            print("\n".join(report.text() for report in reports))
        return _print_result(reports, args)
    summary = summarize_shards(args.folder)
    shards = job.files - len(summary.missing)
    if args.json:
        content = {
            "format_version": FORMAT_VERSION, "command": job.command, "records": summary.records,
            "bytes": summary.bytes, "shards": shards, "missing": summary.missing,
            "bad_records": [dataclasses.asdict(record) for record in summary.bad_records],
        }  # fmt: skip
        print(json.dumps(content, indent=1))
    else:
        for name in summary.missing[:MAX_PRINTED]:
            print(f"missing: {name}")
        if len(summary.missing) > MAX_PRINTED:
            print(f"missing: {len(summary.missing) - MAX_PRINTED:,} more")
        print_skipped(summary.bad_records)
        print(f"{summary.records:,} records, {summary.bytes:,} bytes in {shards:,} of {job.files:,} shards")
    total = summary.records + len(summary.bad_records)
    return 1 if summary.missing or len(summary.bad_records) > args.max_bad_fraction * total else 0
