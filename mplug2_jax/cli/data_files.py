"""``mplug2 data show | validate | convert | chunk``: what reads and writes data sets."""

import argparse
import collections
import dataclasses
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mplug2_jax.cli.common import add_command
from mplug2_jax.errors import UserError, check_range, did_you_mean

if TYPE_CHECKING:
    from data_pipelines.config import DataConfig, SourceConfig
    from data_pipelines.loader import ExampleBuilder
    from data_pipelines.tokenizers import Tokenizer
    from data_pipelines.validate import ValidationReport
    from mplug2_jax.training.config import RunConfig

WORD_EDGES = (0, 1, 5, 10, 15, 20, 30, 50, 100, 500)
SECOND_EDGES = (0, 1, 2, 5, 10, 30, 60, 300, 3600)
NAMED = 20  # faults and duplicates that are printed


def add_parsers(kinds: Any) -> None:
    """Adds the sub-commands."""
    show = add_command(
        kinds, "show", run_show, config=True,
        summary="Write the batch that a step of a recipe sees as a contact sheet",
        details="The sheet is a picture and a page.",
        example="mplug2 data show demo --stream video_text --step 7 --out runs/sheets",
    )  # fmt: skip
    show.add_argument("recipe", metavar="RECIPE", help="a file, or the name of a shipped recipe")
    show.add_argument("--stream", help="which stream (default: all)")
    show.add_argument("--step", type=int, default=1, help="which step; the first is 1 (default: %(default)s)")
    show.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder to write into (default: here)")
    check = add_command(
        kinds, "validate", run_validate, config=True,
        summary="Read data as training would, and say what of it would be lost",
        details="The last line is the verdict. Exit status 1: more would be lost than --allow.",
        example="mplug2 data validate webdataset:shards/{00000..00127}.tar --kind image",
    )  # fmt: skip
    check.add_argument("spec", metavar="SPEC", help="FORMAT:PATH, or a recipe: its streams and evaluations")
    _add_source(check)
    check.add_argument(
        "--allow", type=float, default=0.0, metavar="SHARE",
        help="share of a source's records that may be lost, 0 to 1 (default: 0)",
    )  # fmt: skip
    check.add_argument("--json", action="store_true", help="print what was found as one JSON object")
    convert = add_command(
        kinds, "convert", run_convert,
        summary="Convert any source to ArrayRecord shards",
        details="Run it again to resume where it was stopped.",
        example="mplug2 data convert webdataset:shards --kind image --shards 64 --out records",
    )  # fmt: skip
    convert.add_argument("spec", metavar="FORMAT:PATH", help="what to convert")
    _add_source(convert)
    convert.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    convert.add_argument("--shards", type=int, default=1, help="number of files (default: %(default)s)")
    convert.add_argument("--workers", type=int, default=2, help="files written at a time (default: %(default)s)")
    chunk = add_command(
        kinds, "chunk", run_chunk,
        summary="Cut text files into records of a fixed number of tokens",
        details="They are for the stream of text.",
        example="mplug2 data chunk wiki.txt --tokenizer vocab.txt --length 512 --out wiki.array_record",
    )  # fmt: skip
    chunk.add_argument("texts", nargs="+", type=Path, metavar="FILE", help="text files in UTF-8")
    chunk.add_argument(
        "--tokenizer", type=Path, required=True, metavar="PATH", help="vocab.txt or *.model, or its folder"
    )
    chunk.add_argument("--length", type=int, default=512, help="tokens of a record (default: %(default)s)")
    chunk.add_argument("--out", type=Path, required=True, metavar="FILE", help="new *.array_record file")


def _add_source(parser: argparse.ArgumentParser) -> None:
    """The settings of a source that FORMAT:PATH leaves open; a recipe brings its own."""
    parser.add_argument("--kind", choices=("image", "video", "text"), default="image", help="(default: %(default)s)")
    parser.add_argument(
        "--media", default="", metavar="DIR", help="folder of what annotations name (default: beside them)"
    )
    parser.add_argument("--split", default="", help="which part, where the files name parts")
    parser.add_argument("--size", type=int, help="only the first so many records")


def _source(args: argparse.Namespace) -> "SourceConfig":
    from data_pipelines.sources.formats import parse_spec

    return parse_spec(args.spec, kind=args.kind, media=args.media, split=args.split, max_records=args.size)


def run_show(args: argparse.Namespace) -> int:
    """Writes STREAM-stepN.html, and .png where there are pictures; never over existing files."""
    from mplug2_jax.config import build, load_recipe
    from mplug2_jax.training.config import RunConfig

    if args.step < 1:
        raise UserError(f"--step {args.step} should be at least 1, the first step")
    config = build(RunConfig, load_recipe(args.recipe, args.overrides))
    if args.stream and args.stream not in config.streams:
        raise UserError(f"--stream {args.stream} is none of the recipe's: {did_you_mean(args.stream, config.streams)}")
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
    """Prints what was found; status 1 if training would lose more of a source than is allowed."""
    from data_pipelines.sources.formats import FORMATS
    from data_pipelines.validate import validate

    check_range("--allow", args.allow, 0, 1)
    recipe = args.spec.partition(":")[0] not in FORMATS
    if args.overrides and not recipe:
        raise UserError(f"{args.overrides[0]} is for recipes, and {args.spec} is none; use --kind, --media, --split")
    reports = []
    for prefix, data, builder, notes in _recipe_data(args) if recipe else _single_source(args):
        for name, source in data.sources.items():
            found = validate(builder, name, views=data.visual.views)
            changed = _changed_shards(source.path) if source.format == "array_record" else []
            reports.append(_Report(f"{prefix}{name}", found, notes, changed))
            notes = []  # what was said when the sources were opened is said once
            if not args.json:
                print(reports[-1].text(), flush=True)
    lost = sum((report.found.lost for report in reports), collections.Counter[str]())
    records = sum(report.found.records for report in reports)
    failed = [report.name for report in reports if report.failed(args.allow)]
    usable = records - lost.total()
    if args.json:
        verdict = {"records": records, "usable": usable, "lost": lost, "allow": args.allow, "failed": failed}
        print(json.dumps(verdict | {"sources": [report.content() for report in reports]}, indent=1))
    else:
        noted = "; notes above" if any(report.notes for report in reports) else ""
        print(f"{usable:,} of {records:,} records are usable: {_losses(lost)}{noted}")
    return 1 if failed else 0


def _losses(lost: collections.Counter[str]) -> str:
    if not lost:
        return "nothing would be lost"
    return f"{lost.total():,} would be lost ({', '.join(f'{count:,} {what}' for what, count in lost.items())})"


@dataclasses.dataclass(frozen=True)
class _Report:
    """What was found in one source."""

    name: str
    found: "ValidationReport"
    notes: Sequence[str]  # said when it was opened
    changed: Sequence[str]  # files that are not what was written

    def failed(self, allow: float) -> bool:
        """Whether more is lost than a share of the records, or a file changed."""
        return bool(self.changed) or self.found.lost.total() > allow * self.found.records

    def content(self) -> dict[str, Any]:
        """All that was found, for programs."""
        found = self.found
        faults = [{"key": fault.key, "reason": fault.reason} for fault in found.faults]
        return {
            "name": self.name, "records": found.records, "usable": found.usable, "pictures": found.pictures,
            "clips": found.clips, "lost": found.lost, "faults": faults, "duplicates": found.duplicates,
            "notes": self.notes, "changed": self.changed,
        }  # fmt: skip

    def text(self) -> str:
        """All that was found, for people."""
        from data_pipelines.validate import histogram

        found = self.found
        lines = [f"{found.records:,} records, {found.pictures:,} encoded pictures, {found.clips:,} encoded clips"]
        lines += self.notes
        lines += [f"{count:,} {what}" for what, count in found.lost.items()]
        lines += [f"  {fault.key}: {fault.reason}" for fault in found.faults[:NAMED]]
        if len(found.faults) > NAMED:
            lines.append(f"  and {found.lost.total() - NAMED:,} more")
        if found.duplicates:
            keys = ", ".join(found.duplicates[:NAMED])
            lines.append(f"{len(found.duplicates):,} ids that several records have: {keys}")
        for file in self.changed:
            lines.append(f"{file} is not what was written: its sha256 differs from the one beside it; convert it again")
        for title, values, edges, unit in (
            ("length of texts", found.words, WORD_EDGES, "words"),
            ("length of clips", found.seconds, SECOND_EDGES, "s"),
        ):
            if values:
                lines += [f"{title}:", *(f"  {bar}" for bar in histogram(values, edges, unit).splitlines())]
        return "\n".join([_printable(self.name), *(f"  {_printable(line)}" for line in lines)])


def _printable(text: str) -> str:
    """A text without what a terminal obeys or cannot encode."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _changed_shards(path: str) -> list[str]:
    """Files that are not what was written, by the checksums beside them; those without one cannot be told."""
    from data_pipelines.convert import check_shard
    from data_pipelines.sources.array_record import SUFFIX
    from data_pipelines.sources.files import find_files

    return [file for file in find_files(path, SUFFIX) if check_shard(Path(file)) is False]


DataSet = tuple[str, "DataConfig", "ExampleBuilder", list[str]]
"""What to put before the sources' names, the sources, what makes examples of them, and what was said on opening."""


def _single_source(args: argparse.Namespace) -> Iterator[DataSet]:
    from data_pipelines.config import DataConfig, ExampleConfig
    from data_pipelines.tokenizers import SPECIAL_TOKENS, WordPieceTokenizer

    data = DataConfig(sources={args.spec: _source(args)}, examples=ExampleConfig(), batch_size=1)
    # Without a recipe no text is asked for, so nothing is encoded.
    yield "", data, *_open_builder(data, WordPieceTokenizer(SPECIAL_TOKENS), args.spec, 0)


def _open_builder(
    data: "DataConfig", tokenizer: "Tokenizer", name: str, seed: int, min_answers: int = 0
) -> "tuple[ExampleBuilder, list[str]]":
    """What makes the examples, and what was said on opening its sources."""
    from data_pipelines.loader import ExampleBuilder

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        builder = ExampleBuilder(data, tokenizer, name, seed, min_answers=min_answers)
    return builder, [str(warning.message) for warning in said if warning.category is UserWarning]


def _recipe_data(args: argparse.Namespace) -> Iterator[DataSet]:
    """The streams of a recipe and its evaluations, in their order."""
    from data_pipelines.sources.formats import parse_spec
    from mplug2_jax.config import build, find_recipe, load_recipe
    from mplug2_jax.tasks.contracts import CONTRACTS
    from mplug2_jax.training.config import RunConfig
    from mplug2_jax.training.workdir import load_or_train_tokenizer

    try:
        find_recipe(args.spec.partition(":")[0])
    except UserError as error:
        if ":" in args.spec:
            parse_spec(args.spec)  # says which formats there are
        raise UserError(f"{error}; data that no recipe names are FORMAT:PATH") from error
    config: RunConfig = build(RunConfig, load_recipe(args.spec, args.overrides))
    tokenizer = load_or_train_tokenizer(config.tokenizer)
    read = [(f"{name}/", name, stream.data, 0) for name, stream in config.streams.items()] + [
        (f"evaluations/{name}/", name, evaluation.data, CONTRACTS[evaluation.task].min_answers)
        for name, evaluation in config.evaluations.items()
    ]
    for prefix, name, data, least in read:
        yield prefix, data, *_open_builder(data, tokenizer, name, config.seed, least)


def run_convert(args: argparse.Namespace) -> int:
    """Writes the shards, a line each; status 1 if records were left out."""
    from data_pipelines.bad_records import BadRecord
    from data_pipelines.config import VisualConfig
    from data_pipelines.convert import convert
    from data_pipelines.sources.formats import open_source

    if args.workers < 1:
        raise UserError(f"--workers {args.workers} should be at least 1")
    config = _source(args)
    records, faults, settings = 0, list[BadRecord](), dataclasses.asdict(config)
    for path, card in convert(
        open_source(config, VisualConfig()), settings, args.out, shards=args.shards, workers=args.workers
    ):
        print(f"{path}: {card.records:,} records, {card.bytes:,} bytes, sha256 {card.sha256[:12]}", flush=True)
        records, faults = records + card.records, [*faults, *card.faults]
    print(f"{records:,} records in {args.shards:,} shards")
    for fault in faults[:NAMED]:
        print(f"left out: {fault.key}: {fault.reason}")
    if len(faults) > NAMED:
        print(f"left out: {len(faults) - NAMED:,} more; the .json files beside the shards name them")
    return 1 if faults else 0


def run_chunk(args: argparse.Namespace) -> int:
    """Writes the file and says how many records it holds."""
    from data_pipelines.corpus import write_corpus
    from data_pipelines.tokenizers import load_tokenizer

    count = write_corpus(args.texts, load_tokenizer(args.tokenizer), args.length, args.out)
    print(f"{args.out}: {count:,} records of {args.length} tokens")
    return 0
