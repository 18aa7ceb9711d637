"""Conversion of any source to ArrayRecord shards: parallel, resumable, with a manifest and checksum for each shard."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.bad_records import BadRecord
from data_pipelines.config import SourceConfig
from data_pipelines.errors import DataError
from data_pipelines.media import Media, encode_video
from data_pipelines.record import Record, Source
from data_pipelines.sources.array_record import SUFFIX, encode_record
from data_pipelines.sources.files import read_bytes
from data_pipelines.storage.file_system import write_atomically
from data_pipelines.storage.local_files import write_locally
from data_pipelines.storage.paths import check_can_write

FORMAT_VERSION = 2
"""Of manifests. Version 1 had no ``format_version``, and called ``bad_records`` "faults"."""


@dataclasses.dataclass(frozen=True)
class ShardManifest:
    """The description of a finished shard, written to a ``.json`` file with the shard's name."""

    source: Mapping[str, Any]  # fields of the source's config
    first: int  # index of the first record in the source
    stop: int  # index after the last one
    records: int  # number of usable ones
    bytes: int
    sha256: str
    bad_records: tuple[BadRecord, ...]  # skipped
    format_version: int = FORMAT_VERSION


def convert(
    source: Source, settings: Mapping[str, Any], out: Path, *, shards: int, workers: int
) -> Iterator[tuple[Path, ShardManifest]]:
    """Write a source as ``shards`` files into a folder; shards that are complete and undamaged are kept.

    Args:
        source: the records.
        settings: the fields of its ``SourceConfig``; a folder holds the shards of one source.
        out: the folder.
        shards: number of files.
        workers: files written at the same time.

    Yields:
        The path and the manifest of each shard, in order, as they are done.

    Raises:
        DataError: more shards than records, or a folder that holds something else.
    """
    if not 1 <= shards <= len(source):
        raise DataError(f"cannot write {shards} shards of {len(source)} records; expected 1 to {len(source)} shards")
    check_can_write(out)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"data-{i:05}-of-{shards:05}{SUFFIX}" for i in range(shards)]
    expected = {path.name for path in paths} | {path.with_suffix(".json").name for path in paths}
    found = out.iterdir() if out.exists() else ()  # in an object store an empty folder does not
    unexpected = sorted(path.name for path in found if path.name not in expected and path.suffix != ".tmp")
    if unexpected:
        raise DataError(
            f"{out} holds {unexpected[0]}, which is none of the {shards} files to write; choose another folder"
        )
    bounds = [len(source) * i // shards for i in range(shards + 1)]
    jobs = [(path, first, stop) for path, first, stop in zip(paths, bounds[:-1], bounds[1:], strict=True)]
    for path, first, stop in jobs:
        manifest = read_manifest(path)
        if manifest and (manifest.source, manifest.first, manifest.stop) != (dict(settings), first, stop):
            raise DataError(f"{path} was made from another source or part of it; choose another folder, or remove it")
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda job: (job[0], _write(source, settings, *job)), jobs)


def read_manifest(path: Path) -> ShardManifest | None:
    """Return the manifest of a shard, of any version; None if the shard was not finished."""
    manifest_path = path.with_suffix(".json")
    try:
        fields = msgspec.json.decode(manifest_path.read_bytes(), type=dict[str, Any])
        fields["source"] = {SourceConfig.OLD_NAMES.get(name, name): fields["source"][name] for name in fields["source"]}
        if "faults" in fields:
            fields["bad_records"] = fields.pop("faults")
        return msgspec.convert(fields | {"format_version": FORMAT_VERSION}, ShardManifest)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{manifest_path} is damaged ({error}); remove it to write the shard again") from error


def check_shard(path: Path) -> bool | None:
    """Return whether a shard's bytes match the checksum of its manifest; None if it has no manifest."""
    manifest = read_manifest(path)
    return None if manifest is None else (path.is_file() and _sha256(path) == manifest.sha256)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(source: Source, settings: Mapping[str, Any], path: Path, first: int, stop: int) -> ShardManifest:
    manifest = read_manifest(path)
    if manifest is not None and check_shard(path):
        return manifest
    bad_records, num_written = [], 0
    compression = "zstd" if settings["kind"] == "text" else "uncompressed"  # media are compressed already
    with write_locally(str(path)) as temporary:
        writer = ArrayRecordWriter(temporary, f"group_size:1,{compression}")
        for index in range(first, stop):
            key = f"record {index}"
            try:
                record = source[index]
                key = record.key
                writer.write(encode_record(_with_media_in_memory(record)))
                num_written += 1
            except DataError as error:
                bad_records.append(BadRecord(str(settings["format"]), key, str(error)))
        writer.close()
        if not num_written:
            raise DataError(f"none of the records {first} to {stop - 1} can be used: {bad_records[0].reason}")
        file = Path(temporary)
        manifest = ShardManifest(
            dict(settings), first, stop, num_written, file.stat().st_size, _sha256(file), tuple(bad_records)
        )
    write_atomically(str(path.with_suffix(".json")), json.dumps(dataclasses.asdict(manifest), indent=1).encode())
    return manifest


def _with_media_in_memory(record: Record) -> Record:
    """Return the record with its media encoded and in memory."""
    if record.frames is not None:
        return dataclasses.replace(record, frames=None, media=encode_frames(record.frames, record.key))
    if record.media is not None and isinstance(record.media.data, str):
        media = dataclasses.replace(record.media, data=read_bytes(record.media.data))
        return dataclasses.replace(record, media=media)
    return record


def encode_frames(frames: UInt8[np.ndarray, "t y x 3"], name: str) -> Media:
    """Encode pixels as a PNG (one frame) or an H.264 mp4 (several)."""
    if len(frames) == 1:
        file = io.BytesIO()
        Image.fromarray(frames[0]).save(file, "PNG")
        return Media("image", file.getvalue(), name)
    return Media("video", encode_video(frames), name)
