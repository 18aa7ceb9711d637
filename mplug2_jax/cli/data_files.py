"""``mplug2 data show | validate | convert | chunk``: what reads and writes data sets."""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mplug2_jax.cli.common import add_command
from mplug2_jax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from data_pipelines.config import ExampleConfig, SourceConfig, VisualConfig
    from data_pipelines.validate import Findings
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
        details="Exit status 1: something would be lost.",
        example="mplug2 data validate webdataset:shards/{00000..00127}.tar --kind image",
    )  # fmt: skip
    check.add_argument("spec", metavar="SPEC", help="FORMAT:PATH, or a recipe, whose streams are read")
    _add_source(check)
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

    return parse_spec(args.spec, kind=args.kind, media=args.media, split=args.split, size=args.size)


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
    from mplug2_jax.report.sheet import write_sheet
    from mplug2_jax.training.workdir import make_tokenizer

    stream = Stream(config.streams[name].data, make_tokenizer(config.tokenizer), name=name, seed=config.seed)
    return write_sheet(folder / f"{name}-step{step}", name, step, stream.batch(step - 1))


def run_validate(args: argparse.Namespace) -> int:
    """Prints what was found; status 1 if training would lose any of it."""
    from data_pipelines.sources.formats import FORMATS, open_source
    from data_pipelines.validate import validate

    lost = 0
    recipe = args.spec.partition(":")[0] not in FORMATS
    if args.overrides and not recipe:
        raise UserError(f"{args.overrides[0]} is for recipes, and {args.spec} is none; use --kind, --media, --split")
    for name, source, visual, examples in _recipe_sources(args) if recipe else _only(args):
        found = validate(open_source(source, visual), visual, examples, name=name)
        print(f"{name}\n{_findings(found)}")
        lost += sum(found.lost.values()) + (source.format == "array_record" and _changed_shards(source.path))
    return 1 if lost else 0


def _changed_shards(path: str) -> int:
    """How many files are not what was written, by the checksums beside them; files without one cannot be told."""
    from data_pipelines.convert import check_shard
    from data_pipelines.sources.array_record import SUFFIX
    from data_pipelines.sources.files import find_files

    changed = [file for file in find_files(path, SUFFIX) if check_shard(Path(file)) is False]
    for file in changed:
        print(f"  {file} is not what was written: its sha256 differs from the one beside it; convert it again")
    return len(changed)


Checked = tuple[str, "SourceConfig", "VisualConfig", "ExampleConfig | None"]


def _only(args: argparse.Namespace) -> Iterator[Checked]:
    from data_pipelines.config import VisualConfig

    yield args.spec, _source(args), VisualConfig(), None


def _recipe_sources(args: argparse.Namespace) -> Iterator[Checked]:
    """Every source of a recipe's streams, in their order."""
    from data_pipelines.sources.formats import parse_spec
    from mplug2_jax.config import build, find_recipe, load_recipe
    from mplug2_jax.training.config import RunConfig

    try:
        find_recipe(args.spec.partition(":")[0])
    except UserError as error:
        if ":" in args.spec:
            parse_spec(args.spec)  # says which formats there are
        raise UserError(f"{error}; data that no recipe names are FORMAT:PATH") from error
    config: RunConfig = build(RunConfig, load_recipe(args.spec, args.overrides))
    for stream_name, stream in config.streams.items():
        for name, source in stream.data.sources.items():
            visual = stream.data.visual
            if source.kind == "image":
                visual = dataclasses.replace(visual, num_frames=1)
            yield f"{stream_name}/{name}", source, visual, stream.data.examples


def _findings(found: "Findings") -> str:
    """All that was found, for people."""
    from data_pipelines.validate import histogram

    lines = [f"  {found.records:,} records, {found.pictures:,} encoded pictures, {found.clips:,} encoded clips"]
    lines += [f"  {count:,} {what}" for what, count in found.lost.items()]
    lines += [f"    {fault.key}: {fault.reason}" for fault in found.faults[:NAMED]]
    if len(found.faults) > NAMED:
        lines.append(f"    and {sum(found.lost.values()) - NAMED:,} more")
    if found.duplicates:
        lines.append(
            f"  {len(found.duplicates):,} ids that several records have: {', '.join(found.duplicates[:NAMED])}"
        )
    if found.empty_texts:
        lines.append(f"  {found.empty_texts:,} empty texts")
    for title, values, edges, unit in (
        ("length of texts", found.words, WORD_EDGES, "words"), ("length of clips", found.seconds, SECOND_EDGES, "s"),
    ):  # fmt: skip
        if values:
            bars = histogram(values, edges, unit).replace("\n", "\n    ")
            lines.append(f"  {title}:\n    {bars}")
    if not found.lost:
        lines.append("  nothing would be lost")
    return "\n".join(lines)


def run_convert(args: argparse.Namespace) -> int:
    """Writes the shards, a line each; status 1 if records were left out."""
    from data_pipelines.config import VisualConfig
    from data_pipelines.convert import convert
    from data_pipelines.faults import Fault
    from data_pipelines.sources.formats import open_source

    if args.workers < 1:
        raise UserError(f"--workers {args.workers} should be at least 1")
    config = _source(args)
    records, faults, settings = 0, list[Fault](), dataclasses.asdict(config)
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
