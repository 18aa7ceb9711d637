"""The inputs of feature extraction: files, folders, annotations and data sets, and the request that identifies them."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from data_pipelines.config import DataConfig, ExampleConfig, Format, Kind, SourceConfig
from data_pipelines.sources.file_source import kind_from_name, list_files
from data_pipelines.sources.formats import FORMATS, parse_spec
from data_pipelines.storage.paths import to_path
from mplug2_jax.config import to_dict
from mplug2_jax.errors import UserError, check_range
from mplug2_jax.inference.features import FeatureConfig, FeatureExtractor
from mplug2_jax.inference.media import visual_config
from mplug2_jax.model.mplug2 import Params
from mplug2_jax.parallel.placement import num_batch_shards
from mplug2_jax.training.checkpoint.checksums import checksums
from mplug2_jax.training.state import RunSpec

ANNOTATIONS = (".json", ".jsonl", ".csv", ".tsv")
BATCH_SIZE, TEXT_LENGTH = 32, 64


def find_sources(
    inputs: Sequence[str], kind: Kind | None, *, media: str = "", split: str = "", max_records: int | None = None
) -> tuple[dict[str, SourceConfig], str]:
    """Return a source per input, by its name, and a hash of the names of all files.

    Args:
        inputs: image, video or text files, folders of them, annotation files, or FORMAT:PATH.
        kind: of all inputs; None: that of the files, or else images.
        media: folder of the media that annotations name; empty: that of the annotations.
        split: of files that name splits.
        max_records: of each source; None: all.

    Raises:
        UserError: an input is of no known format or repeated, or files are of several kinds.
        DataError: a folder has no files, or a URL cannot be opened.
    """
    formats: dict[str, tuple[Format, str]] = {}
    counts = Counter[Kind]()
    names: list[str] = []
    for name in inputs:
        if name in formats:
            raise UserError(f"{name} is given twice; give each input once")
        if name.partition(":")[0] in FORMATS:
            spec = parse_spec(name)
            formats[name] = (spec.format, spec.path)
            continue
        path = to_path(name)
        if path.is_dir() or (path.is_file() and kind_from_name(name)):
            files = list_files(name) if path.is_dir() else [name]
            counts.update(filter(None, map(kind_from_name, files)))
            names += files
            formats[name] = ("files", name)
        elif path.is_file() and path.suffix in ANNOTATIONS:
            formats[name] = ("annotations", name)
        else:
            problem = "is not an image, video, text or annotation file" if path.is_file() else "does not exist"
            raise UserError(
                f"{name} {problem}; expected {', '.join(ANNOTATIONS)}, .txt, an image, a video, a folder of them, or "
                "FORMAT:PATH"
            )
    if not kind and len(counts) > 1:
        kinds = " and ".join(f"{count:,} {each}{'s' * (count > 1)}" for each, count in sorted(counts.items()))
        raise UserError(f"{', '.join(inputs[:3])}: found {kinds}, expected one kind; select it with --kind")
    default: Kind = next(iter(counts), "image")
    kind = kind or default
    expand: Literal["record", "text"] = "text" if kind == "text" else "record"
    sources = {
        name: SourceConfig(
            format=format, path=path, kind=kind, media=media, split=split, max_records=max_records, expand=expand
        )
        for name, (format, path) in formats.items()
    }
    return sources, _hash("\n".join(names)) if names else ""


def make_data_config(
    sources: Mapping[str, SourceConfig], spec: RunSpec, *, batch_size: int | None = None, text_length: int | None = None
) -> DataConfig:
    """Return the config of the sources, read as the run reads its data.

    Args:
        sources: by name.
        spec: of the run.
        batch_size: over all devices; None: ``BATCH_SIZE``, rounded up to what the mesh divides.
        text_length: maximum tokens of a text; None: the longest of the run's streams.

    Raises:
        UserError: the text length is out of range.
    """
    config, shards = spec.config, num_batch_shards(spec.mesh)
    examples = ExampleConfig()
    if next(iter(sources.values())).kind == "text":
        check_range("--text-length", text_length, 3, config.model.max_positions)
        streams = [stream.data.examples for stream in config.streams.values()]
        trained = max(streams, key=lambda examples: examples.text_length)
        examples = ExampleConfig(
            text="sentence", tokenization=trained.tokenization,
            text_length=text_length or trained.text_length or min(TEXT_LENGTH, config.model.max_positions),
        )  # fmt: skip
    return DataConfig(
        sources=sources, visual=visual_config(config), examples=examples,
        batch_size=batch_size or -(-BATCH_SIZE // shards) * shards,
    )  # fmt: skip


def make_request(
    feature: FeatureConfig, data: DataConfig, extractor: FeatureExtractor, spec: RunSpec, params: Params, *, step: int,
    listing: str,
) -> dict[str, Any]:  # fmt: skip
    """Return everything that determines the features, as JSON values, with hashes of the weights and file names."""
    if data.kind == "text":
        reading: dict[str, Any] = {
            "text_length": data.examples.text_length, "tokenization": data.examples.tokenization
        }  # fmt: skip
    else:
        reading = {"visual": dataclasses.asdict(data.visual)}
    model = {
        "run": spec.config.name, "parts": list(spec.model_def.parts), "config": to_dict(spec.config.model),
        "weights": _hash(json.dumps(checksums(params), sort_keys=True)),
    }  # fmt: skip
    return {
        "feature": dataclasses.asdict(feature), "kind": data.kind, "step": step, "listing": listing,
        "inputs": {name: source.identity() for name, source in data.sources.items()},
        "arrays": {name: {"shape": shape, "dtype": dtype} for name, (shape, dtype) in extractor.shapes.items()},
        "model": model, **reading,
    }  # fmt: skip


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]
