"""``mplug2 embed``: features of pictures, clips or texts into files."""

import argparse
import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mplug2_jax.cli.common import RecordProgress, add_command, add_run, open_run
from mplug2_jax.cli.media import visual_of
from mplug2_jax.errors import UserError, check_range

if TYPE_CHECKING:
    from data_pipelines.config import DataConfig, SourceConfig
    from mplug2_jax.inference.feature_files import FeatureWriter
    from mplug2_jax.inference.features import FeatureExtractor
    from mplug2_jax.model.mplug2 import Params
    from mplug2_jax.training.config import RunConfig
    from mplug2_jax.training.state import RunSpec

ANNOTATIONS = (".json", ".jsonl", ".csv", ".tsv")
BATCH, TEXT_LENGTH = 32, 64
NAMED = 20  # faults that are printed


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "embed", run, config=True,
        summary="Write features of images, videos or texts to files",
        details="Run it again to resume where it was stopped.",
        example="mplug2 embed --workdir runs/demo pictures --out features --feature contrastive",
    )  # fmt: skip
    add_run(parser)
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT",
        help="image, video, GIF or .txt, a folder of them, an annotation file (.json, .jsonl, .csv, .tsv), or any "
        "FORMAT:PATH of mplug2 data",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the features")
    parser.add_argument(
        "--feature", default="contrastive", metavar="NAME",
        help="contrastive: unit vectors; pooled: the mean over all last tokens but padding; or the name of a tap, as "
        "visual/out (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--pool", choices=("none", "mean", "cls"), default="none",
        help="what is kept of a tap's tokens: all, their mean, or the first (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=("safetensors", "npz", "parquet"), default="safetensors", help="(default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, help=f"over all devices (default: {BATCH}, or what the mesh splits)")
    parser.add_argument(
        "--kind", choices=("image", "video", "text"), help="what is embedded (default: what files are, else image)"
    )
    parser.add_argument("--text-length", type=int, help="tokens that longer texts are cut to (default: the run's)")
    parser.add_argument("--media", default="", metavar="DIR", help="of what annotations name (default: beside them)")
    parser.add_argument("--split", default="", help="which part, where the files name parts")
    parser.add_argument("--size", type=int, help="only the first so many records of each input")


def run(args: argparse.Namespace) -> int:
    """Writes the shards, a line each; status 1 if records were left out."""
    from mplug2_jax.inference.feature_files import FeatureWriter
    from mplug2_jax.inference.features import FeatureConfig, FeatureExtractor
    from mplug2_jax.parallel.processes import check_same_across_processes, initialize_distributed, is_primary_process

    check_range("--batch-size", args.batch_size, 1)
    initialize_distributed()
    wanted = FeatureConfig(name=args.feature, pool=args.pool)
    sources, listing = read_inputs(args)
    spec, params, step, tokenizer = open_run(args)
    data = _data(args, sources, spec)
    features = FeatureExtractor(wanted, data, spec.definition, tokenizer, spec.mesh, seed=spec.config.seed)
    request = {
        "feature": dataclasses.asdict(wanted), "kind": data.kind, "step": step, "listing": listing,
        "inputs": {name: dataclasses.asdict(source) for name, source in sources.items()},
        "arrays": {name: {"shape": shape, "dtype": dtype} for name, (shape, dtype) in features.shapes.items()},
        "model": _model(spec, params), **_reading(data),
    }  # fmt: skip
    folder = FeatureWriter(args.out, request, args.format, len(features))
    # The first process writes once all have read.
    check_same_across_processes({"features that are there": folder.done})
    if is_primary_process():
        folder.begin()
        print(f"step {step}: {args.feature} of {len(features):,} {data.kind}s, {_shapes(features)}", flush=True)
    _write(features, folder, params)
    return _report(folder) if is_primary_process() else 0


def _write(features: "FeatureExtractor", folder: "FeatureWriter", params: "Params") -> None:
    from mplug2_jax.parallel.processes import is_primary_process
    from mplug2_jax.training.reliability.preemption import PreemptionNotice

    if folder.done and is_primary_process():
        print(f"{folder.done:,} records were done before", flush=True)
    if folder.done == len(features):
        return
    with (
        PreemptionNotice() as notice,
        RecordProgress(folder.done, len(features), quiet=not is_primary_process()) as progress,
    ):

        def between(place: int) -> None:
            notice.check()
            progress.show(place)

        for shard in features.shards(params, folder.done, between):
            if is_primary_process():
                path = folder.write(shard)
                progress.say(f"{path}: {len(shard.ids):,} ids")


def _report(folder: "FeatureWriter") -> int:
    """Prints what was left out; 1 if anything was."""
    faults = [fault for shard in folder.shards for fault in shard["faults"]]
    for fault in faults[:NAMED]:
        print(f"left out: {fault['key']}: {fault['reason']}")
    if len(faults) > NAMED:
        print(f"left out: {len(faults) - NAMED:,} more; {folder.path / 'index.json'} names them")
    return 1 if faults else 0


def read_inputs(args: argparse.Namespace) -> "tuple[dict[str, SourceConfig], str]":
    """A source for each input, by its name, and a digest of the names of all files that were found.

    Raises:
        UserError: an input that is nothing of what can be read, the same twice, or files of several kinds.
        DataError: a folder without files.
    """
    from data_pipelines.config import Format, Kind, SourceConfig
    from data_pipelines.sources.file_source import kind_from_name, list_files
    from data_pipelines.sources.formats import FORMATS, parse_spec

    formats: dict[str, tuple[Format, str]] = {}
    kinds = Counter[Kind]()
    names: list[str] = []
    for given in args.inputs:
        path = Path(given)
        if given in formats:
            raise UserError(f"{given} is given twice; give each input once")
        if path.is_dir() or (path.is_file() and kind_from_name(given)):
            found = list_files(given) if path.is_dir() else [given]
            kinds.update(filter(None, map(kind_from_name, found)))
            names += found
            formats[given] = ("files", given)
        elif path.is_file() and path.suffix in ANNOTATIONS:
            formats[given] = ("annotations", given)
        elif given.partition(":")[0] in FORMATS:
            spec = parse_spec(given)
            formats[given] = (spec.format, spec.path)
        else:
            what = "is no image, video, text or annotation file by its name" if path.is_file() else "does not exist"
            raise UserError(
                f"{given} {what}; expected {', '.join(ANNOTATIONS)}, .txt, an image, a video, a folder of them, or "
                "FORMAT:PATH"
            )
    if not args.kind and len(kinds) > 1:
        counts = " and ".join(f"{count:,} {kind}s" for kind, count in sorted(kinds.items()))
        raise UserError(f"{', '.join(args.inputs[:3])}: {counts} are not embedded together; choose with --kind")
    found_kind: Kind = next(iter(kinds), "image")
    kind: Kind = args.kind or found_kind
    each: Literal["record", "text"] = "text" if kind == "text" else "record"
    sources = {
        given: SourceConfig(
            format=format, path=path, kind=kind, media=args.media, split=args.split, max_records=args.size, expand=each
        )
        for given, (format, path) in formats.items()
    }
    return sources, hashlib.sha256("\n".join(names).encode(errors="surrogatepass")).hexdigest()[:16] if names else ""


def _data(args: argparse.Namespace, sources: "dict[str, SourceConfig]", spec: "RunSpec") -> "DataConfig":
    """The inputs as batches of the run's form."""
    from data_pipelines.config import DataConfig, ExampleConfig
    from mplug2_jax.parallel.placement import num_batch_shards

    config, shards = spec.config, num_batch_shards(spec.mesh)
    examples = ExampleConfig()
    if next(iter(sources.values())).kind == "text":
        check_range("--text-length", args.text_length, 3, config.model.max_positions)
        trained = _trained_on_texts(config)
        examples = ExampleConfig(
            text="sentence", tokenization=trained.tokenization,
            text_length=args.text_length or trained.text_length or min(TEXT_LENGTH, config.model.max_positions),
        )  # fmt: skip
    return DataConfig(
        sources=sources, visual=visual_of(config), examples=examples,
        batch_size=args.batch_size or -(-BATCH // shards) * shards,
    )  # fmt: skip


def _trained_on_texts(config: "RunConfig") -> Any:
    """How the stream with the longest texts reads them."""
    return max((stream.data.examples for stream in config.streams.values()), key=lambda form: form.text_length)


def _reading(data: "DataConfig") -> dict[str, Any]:
    """How records are read, as far as it changes features."""
    if data.kind == "text":
        return {"text_length": data.examples.text_length, "tokenization": data.examples.tokenization}
    return {"visual": dataclasses.asdict(data.visual)}


def _model(spec: "RunSpec", params: "Params") -> dict[str, Any]:
    """Which model it is, and a digest of its weights."""
    from mplug2_jax.config import to_dict
    from mplug2_jax.training.checkpoint.checksums import checksums

    weights = json.dumps(checksums(params), sort_keys=True).encode()
    return {
        "run": spec.config.name, "parts": list(spec.definition.parts), "config": to_dict(spec.config.model),
        "weights": hashlib.sha256(weights).hexdigest()[:16],
    }  # fmt: skip


def _shapes(features: "FeatureExtractor") -> str:
    """The arrays of an example, for people."""
    return ", ".join(
        f"{name} [{', '.join(map(str, shape))}] {dtype}" for name, (shape, dtype) in features.shapes.items()
    )
