"""The table of source formats, and the fields of a source's config that each reads."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, cast

from data_pipelines.config import ALL_RECORDS, Format, SourceConfig, VisualConfig
from data_pipelines.digitworld.source import DigitWorld
from data_pipelines.errors import DataError
from data_pipelines.record import Record, Source, check_index
from data_pipelines.sources.annotations import fields, glue, public_formats
from data_pipelines.sources.annotations.source import AnnotationFormat, AnnotationSource
from data_pipelines.sources.array_record import ArrayRecordSource
from data_pipelines.sources.expand import OneTextPerRecord
from data_pipelines.sources.file_source import FileSource
from data_pipelines.sources.folder import FolderSource
from data_pipelines.sources.hash_range import HashRange
from data_pipelines.sources.tfds import TfdsSource
from data_pipelines.sources.webdataset import WebDatasetSource


def open_source(config: SourceConfig, visual: VisualConfig) -> Source:
    """Open the source of a config; DigitWorld renders frames of the size and number in ``visual``.

    Raises:
        DataError: an empty or missing source, or a field that is out of range or that the format does not read.
    """
    spec = FORMATS[config.format]
    for field in dataclasses.fields(config):
        if field.name in _OPTIONAL - spec.fields and getattr(config, field.name) != field.default:
            raise DataError(
                f"source.{field.name}={getattr(config, field.name)!r} is not read by format '{config.format}', which "
                f"reads {', '.join(sorted(spec.fields))}; remove it"
            )
    if "path" in spec.fields and not config.path:
        raise DataError(f"source.path is empty; format '{config.format}' needs the path of its files")
    source = spec.open(config, visual) if config.max_records != 0 else ()
    if config.hash_range != ALL_RECORDS and len(source):
        source = HashRange(source, *config.hash_range)
    if not len(source):
        part = "" if config.hash_range == ALL_RECORDS else f" with a hash of its key in {list(config.hash_range)}"
        setting = "source.max_records=0" if config.max_records == 0 else f"no record{part} in {config.path}"
        raise DataError(
            f"the source {config.format} ({config.kind}{config.split and f', {config.split}'}) is empty: {setting}, "
            "expected at least 1"
        )
    if config.max_records is not None and config.max_records < len(source):
        source = _Take(source, config.max_records)
    return OneTextPerRecord(source, config.kind) if config.expand == "text" else source


def parse_spec(spec: str, **settings: Any) -> SourceConfig:
    """Return the config of "FORMAT:PATH", with further fields.

    Raises:
        DataError: an unknown format; suggests the nearest name.
    """
    format, colon, path = spec.partition(":")
    if not colon or format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise DataError(f"'{spec}' is not FORMAT:PATH with a known format: {hint}(valid: {', '.join(FORMATS)})")
    return SourceConfig(format=cast(Format, format), path=path, **settings)


_OPTIONAL = frozenset({"path", "media", "index", "split", "seed", "label"})


class _Take:
    """The first records of a source."""

    def __init__(self, source: Source, length: int) -> None:
        self._source, self._length = source, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        check_index(index, self._length)
        return self._source[index]


@dataclasses.dataclass(frozen=True)
class FormatSpec:
    """The opener of a format, and the optional fields of a source's config that it reads."""

    open: Callable[[SourceConfig, VisualConfig], Source]
    fields: frozenset[str]


def _digitworld(config: SourceConfig, visual: VisualConfig) -> Source:
    size = 100_000 if config.max_records is None else config.max_records
    return DigitWorld(
        config.kind, split=config.split or "train", seed=config.seed, size=size, image_size=visual.image_size,
        num_frames=visual.num_frames, label=config.label,
    )  # fmt: skip


def _annotations(format: AnnotationFormat) -> FormatSpec:
    return FormatSpec(
        lambda config, visual: AnnotationSource(format, config.path, config.media, config.split, config.kind),
        frozenset({"path", "media", "split"} if format.has_splits else {"path", "media"}),
    )


_PATH = frozenset({"path"})

FORMATS: Mapping[Format, FormatSpec] = {
    "annotations": _annotations(fields.FORMAT),
    "array_record": FormatSpec(lambda config, visual: ArrayRecordSource(config.path), _PATH),
    "captioned_folder": FormatSpec(lambda config, visual: FolderSource(config.path, config.kind), _PATH),
    "coco_captions": _annotations(public_formats.COCO),
    "digitworld": FormatSpec(_digitworld, frozenset({"split", "seed", "label"})),
    "files": FormatSpec(lambda config, visual: FileSource(config.path, config.kind), _PATH),
    "glue": FormatSpec(_annotations(glue.FORMAT).open, _PATH),
    "image_folder": FormatSpec(lambda config, visual: public_formats.ImageFolder(config.path, config.kind), _PATH),
    "karpathy": _annotations(public_formats.KARPATHY),
    "kinetics": _annotations(public_formats.KINETICS),
    "ssv2": _annotations(public_formats.SSV2),
    "tfds": FormatSpec(
        lambda config, visual: TfdsSource(config.path, config.split or "train", config.kind), _PATH | {"split"}
    ),
    "vqa_v2": _annotations(public_formats.VQA),
    "webdataset": FormatSpec(
        lambda config, visual: WebDatasetSource(config.path, config.kind, config.index), _PATH | {"index"}
    ),
}
"""Every format of :data:`Format`."""
