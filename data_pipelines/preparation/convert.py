"""Conversion of any source to ArrayRecord shards: parallel and resumable."""

import dataclasses
import io
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.bad_records import BadRecord
from data_pipelines.errors import DataError
from data_pipelines.media import Media, encode_video
from data_pipelines.preparation.jobs import SINGLE_WORKER, Job, Worker
from data_pipelines.preparation.shards import (
    ShardManifest,
    check_manifest,
    prepare_output_folder,
    read_manifest,
    write_shard,
)
from data_pipelines.record import Record, Source
from data_pipelines.sources.array_record import encode_record
from data_pipelines.sources.files import read_bytes


def convert(
    source: Source,
    settings: Mapping[str, Any],
    out: Path,
    *,
    shards: int,
    num_threads: int = 2,
    worker: Worker = SINGLE_WORKER,
) -> Iterator[tuple[Path, ShardManifest]]:
    """Write a source as ``shards`` files into a folder; shards that are complete and undamaged are kept.

    Args:
        source: the records.
        settings: the fields of its ``SourceConfig``; a folder holds the shards of one source.
        out: the folder.
        shards: number of files.
        num_threads: files written at the same time.
        worker: writes only its share of the files.

    Yields:
        The path and the manifest of each shard, in order, as they are done.

    Raises:
        DataError: more shards than records, or a folder that holds something else.
    """
    if not 1 <= shards <= len(source):
        raise DataError(f"cannot write {shards} shards of {len(source)} records; expected 1 to {len(source)} shards")
    paths = prepare_output_folder(out, Job("convert", dict(settings), shards))
    bounds = [len(source) * i // shards for i in range(shards + 1)]
    parts = worker.select_share(list(zip(paths, bounds[:-1], bounds[1:], strict=True)))
    for path, first, stop in parts:
        if manifest := read_manifest(path):
            check_manifest(path, manifest, settings, first, stop)
    compression = "zstd" if settings["kind"] == "text" else "uncompressed"  # media are compressed already

    def write(part: tuple[Path, int, int]) -> tuple[Path, ShardManifest]:
        path, first, stop = part
        records = _encode_records(source, str(settings["format"]), range(first, stop))
        return path, write_shard(path, settings, first, stop, compression, records)

    with ThreadPoolExecutor(num_threads) as pool:
        yield from pool.map(write, parts)


def _encode_records(source: Source, name: str, indices: range) -> Iterator[bytes | BadRecord]:
    """Yield records as bytes, or why one cannot be used."""
    for index in indices:
        key = f"record {index}"
        try:
            record = source[index]
            key = record.key
            yield encode_record(_with_media_in_memory(record))
        except DataError as error:
            yield BadRecord(name, key, str(error))


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
