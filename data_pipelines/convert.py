"""Any source into ArrayRecord shards: in parallel, restartable, with a checksum beside every shard."""

import dataclasses
import hashlib
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.config import SourceConfig
from data_pipelines.errors import DataError
from data_pipelines.faults import Fault
from data_pipelines.media import Media, write_video
from data_pipelines.record import Record, Source
from data_pipelines.sources.array_record import SUFFIX, encode_record
from data_pipelines.sources.files import read_bytes, write_atomically


@dataclasses.dataclass(frozen=True)
class Finished:
    """What stands beside a finished file, to know it again."""

    source: Mapping[str, Any]  # the settings that it was made from
    first: int  # the source's records from this one
    stop: int  # up to this one, which is not in it
    records: int  # how many of them could be used
    bytes: int
    sha256: str
    faults: tuple[Fault, ...]  # records that were left out


def convert(
    source: Source, settings: Mapping[str, Any], out: Path, *, shards: int, workers: int
) -> Iterator[tuple[Path, Finished]]:
    """Writes a source as ``shards`` files into a folder; a file that is finished and whole is not written again.

    Args:
        source: the records.
        settings: the fields of its ``SourceConfig``; a folder holds the files of one source.
        out: the folder.
        shards: number of files.
        workers: files written at the same time.

    Yields:
        Each file with what stands beside it, in order, as they are done.

    Raises:
        DataError: more shards than records, or a folder that holds something else.
    """
    if not 1 <= shards <= len(source):
        raise DataError(f"{shards} shards of {len(source)} records; expected 1 to {len(source)} shards")
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"data-{i:05}-of-{shards:05}{SUFFIX}" for i in range(shards)]
    ours = {path.name for path in paths} | {_card(path).name for path in paths}
    strange = sorted(path.name for path in out.iterdir() if path.name not in ours and path.suffix != ".tmp")
    if strange:
        raise DataError(
            f"{out} holds {strange[0]}, which is none of the {shards} files to write; choose another folder"
        )
    bounds = [len(source) * i // shards for i in range(shards + 1)]
    jobs = [(path, first, stop) for path, first, stop in zip(paths, bounds[:-1], bounds[1:], strict=True)]
    for path, first, stop in jobs:
        known = read_card(path)
        if known and (known.source, known.first, known.stop) != (dict(settings), first, stop):
            raise DataError(f"{path} was made from another source or part of it; choose another folder, or remove it")
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda job: (job[0], _write(source, settings, *job)), jobs)


def read_card(path: Path) -> Finished | None:
    """What stands beside a shard, or None where it was not finished."""
    try:
        values = json.loads(_card(path).read_bytes())
        source = {SourceConfig.OLD_NAMES.get(name, name): value for name, value in values["source"].items()}
        return Finished(**values | {"source": source, "faults": tuple(Fault(**fault) for fault in values["faults"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{_card(path)} is damaged ({error}); remove it to write the shard again") from error


def check_shard(path: Path) -> bool | None:
    """Whether a shard's bytes are those that were written; None where nothing stands beside it."""
    card = read_card(path)
    return None if card is None else (path.is_file() and _sha256(path) == card.sha256)


def _card(path: Path) -> Path:
    return path.with_suffix(".json")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(source: Source, settings: Mapping[str, Any], path: Path, first: int, stop: int) -> Finished:
    card = read_card(path)
    if card is not None and check_shard(path):
        return card
    temporary = path.with_suffix(".tmp")
    faults, written = [], 0
    compression = "zstd" if settings["kind"] == "text" else "uncompressed"  # media are compressed already
    writer = ArrayRecordWriter(str(temporary), f"group_size:1,{compression}")
    for index in range(first, stop):
        key = f"record {index}"
        try:
            record = source[index]
            key = record.key
            writer.write(encode_record(_in_memory(record)))
            written += 1
        except DataError as error:
            faults.append(Fault(str(settings["format"]), key, str(error)))
    writer.close()
    if not written:
        raise DataError(f"none of the records {first} to {stop - 1} can be used: {faults[0].reason}")
    card = Finished(dict(settings), first, stop, written, temporary.stat().st_size, _sha256(temporary), tuple(faults))
    temporary.replace(path)
    write_atomically(str(_card(path)), json.dumps(dataclasses.asdict(card), indent=1).encode())
    return card


def _in_memory(record: Record) -> Record:
    """The record with its media encoded and at hand."""
    if record.frames is not None:
        return dataclasses.replace(record, frames=None, media=encode_frames(record.frames, record.key))
    if record.media is not None and isinstance(record.media.data, str):
        media = dataclasses.replace(record.media, data=read_bytes(record.media.data))
        return dataclasses.replace(record, media=media)
    return record


def encode_frames(frames: UInt8[np.ndarray, "t y x 3"], name: str) -> Media:
    """Pixels as a PNG (one frame) or an H.264 mp4 (several)."""
    if len(frames) == 1:
        file = io.BytesIO()
        Image.fromarray(frames[0]).save(file, "PNG")
        return Media("image", file.getvalue(), name)
    with tempfile.NamedTemporaryFile(suffix=".mp4") as clip:
        write_video(Path(clip.name), frames)
        return Media("video", clip.read(), name)
