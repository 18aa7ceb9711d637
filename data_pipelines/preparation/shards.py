"""ArrayRecord shards of a folder, each with a manifest that has its checksum."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from array_record.python.array_record_module import ArrayRecordWriter

from data_pipelines.bad_records import BadRecord
from data_pipelines.config import SourceConfig
from data_pipelines.errors import DataError
from data_pipelines.preparation.jobs import JOB_FILE, Job, join_job, read_job
from data_pipelines.sources.array_record import SUFFIX
from data_pipelines.storage.file_system import file_system, write_atomically
from data_pipelines.storage.local_files import staged_write
from data_pipelines.storage.paths import check_can_write

FORMAT_VERSION = 2
"""Of manifests. Version 1 had no ``format_version``, and called ``bad_records`` "faults"."""


@dataclasses.dataclass(frozen=True)
class ShardManifest:
    """The description of a finished shard, written to a ``.json`` file with the shard's name."""

    source: Mapping[str, Any]  # fields of the source's config; of a corpus: texts, tokenizer, length
    first: int  # index of the first record in the source; of a corpus: of the first byte in the texts
    stop: int  # index after the last one
    records: int  # number of usable ones
    bytes: int
    sha256: str
    bad_records: tuple[BadRecord, ...]  # skipped
    format_version: int = FORMAT_VERSION


def shard_paths(folder: Path, count: int) -> list[Path]:
    """Return the paths of the shards of a folder."""
    return [folder / f"data-{i:05}-of-{count:05}{SUFFIX}" for i in range(count)]


def prepare_output_folder(folder: Path, job: Job) -> list[Path]:
    """Create the folder of a job's shards, if there is none, and return their paths.

    Raises:
        DataError: the folder holds something else.
    """
    check_can_write(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = shard_paths(folder, job.files)
    expected = {JOB_FILE} | {path.name for path in paths} | {path.with_suffix(".json").name for path in paths}
    found = folder.iterdir() if folder.exists() else ()  # in an object store an empty folder does not
    unexpected = sorted(path.name for path in found if path.name not in expected and path.suffix != ".tmp")
    if unexpected:
        raise DataError(
            f"{folder} holds {unexpected[0]}, which is none of the {job.files} files to write; choose another folder"
        )
    join_job(folder, job)
    return paths


@dataclasses.dataclass(frozen=True)
class ShardSummary:
    """The shards of a folder."""

    job: Job
    records: int  # usable ones
    bytes: int
    bad_records: list[BadRecord]  # skipped
    missing: list[str]  # names of shards that were not finished, or whose size is not that of their manifest


def summarize_shards(folder: Path) -> ShardSummary:
    """Join the manifests of a folder.

    Raises:
        FileNotFoundError: the folder was not written by a job.
        DataError: a file is damaged.
    """
    job = read_job(folder)
    fs, fs_path = file_system(str(folder))
    infos = fs.find(fs_path, maxdepth=1, detail=True)
    sizes = {name.rpartition("/")[2]: int(info["size"]) for name, info in infos.items()}
    summary = ShardSummary(job, 0, 0, [], [])
    for path in shard_paths(folder, job.files):
        manifest = read_manifest(path)
        if manifest is None or sizes.get(path.name) != manifest.bytes:
            summary.missing.append(path.name)
            continue
        summary = dataclasses.replace(
            summary, records=summary.records + manifest.records, bytes=summary.bytes + manifest.bytes
        )
        summary.bad_records.extend(manifest.bad_records)
    return summary


def write_shard(
    path: Path,
    settings: Mapping[str, Any],
    first: int,
    stop: int,
    compression: str,
    records: Iterable[bytes | BadRecord],
) -> ShardManifest:
    """Write a shard and its manifest; one that is complete and undamaged is kept.

    Args:
        path: of the shard.
        settings: of its source.
        first: where its part of the source begins.
        stop: where it ends.
        compression: an option of ArrayRecord.
        records: encoded, or why one is skipped; not read if the shard is kept.

    Raises:
        DataError: there is no record, or the shard is that of another source.
    """
    manifest = read_manifest(path)
    if manifest is not None:
        check_manifest(path, manifest, settings, first, stop)
        if check_shard(path):
            return manifest
    with staged_write(str(path)) as temporary:
        writer, num_written, bad_records = ArrayRecordWriter(temporary, f"group_size:1,{compression}"), 0, []
        for record in records:
            if isinstance(record, BadRecord):
                bad_records.append(record)
            else:
                writer.write(record)
                num_written += 1
        writer.close()
        if bad_records and not num_written:
            raise DataError(f"none of the records {first} to {stop - 1} can be used: {bad_records[0].reason}")
        if not num_written:
            raise DataError(f"{path} would have no record; choose fewer shards")
        file = Path(temporary)
        manifest = ShardManifest(
            dict(settings), first, stop, num_written, file.stat().st_size, _sha256(file), tuple(bad_records)
        )
    write_atomically(str(path.with_suffix(".json")), json.dumps(dataclasses.asdict(manifest), indent=1).encode())
    return manifest


def check_manifest(path: Path, manifest: ShardManifest, settings: Mapping[str, Any], first: int, stop: int) -> None:
    """Check that a shard is of this part of a source. Raises DataError."""
    if (manifest.source, manifest.first, manifest.stop) != (dict(settings), first, stop):
        raise DataError(f"{path} was made from another source or part of it; choose another folder, or remove it")


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
