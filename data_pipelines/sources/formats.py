"""Which records: the table of formats, and what each reads of a source's settings."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, cast

from data_pipelines.config import Format, SourceConfig, VisualConfig
from data_pipelines.digitworld.source import DigitWorld
from data_pipelines.errors import DataError
from data_pipelines.record import Record, Source
from data_pipelines.sources.annotations import fields, glue, pictures
from data_pipelines.sources.annotations.source import AnnotationFormat, AnnotationSource
from data_pipelines.sources.array_record import ArrayRecordSource
from data_pipelines.sources.each_text import EachText
from data_pipelines.sources.loose_files import LooseFiles
from data_pipelines.sources.tfds import TfdsSource
from data_pipelines.sources.webdataset import WebDatasetSource


def open_source(config: SourceConfig, visual: VisualConfig) -> Source:
    """The records that a config is of; DigitWorld draws as ``visual`` asks.

    Raises:
        DataError: an empty or missing source, or a setting that is out of range or that the format does not read.
    """
    opener = FORMATS[config.format]
    for field in dataclasses.fields(config):
        if field.name in _OPTIONAL - opener.reads and getattr(config, field.name) != field.default:
            raise DataError(
                f"source.{field.name}={getattr(config, field.name)!r} means nothing to format '{config.format}', which "
                f"reads {', '.join(sorted(opener.reads))}; leave it out"
            )
    if "path" in opener.reads and not config.path:
        raise DataError(f"source.path is empty; format '{config.format}' needs the path of its files")
    source = opener.open(config, visual) if config.max_records != 0 else ()
    if not len(source):
        setting = "source.max_records=0" if config.max_records == 0 else f"no record in {config.path}"
        raise DataError(
            f"the source {config.format} ({config.kind}{config.split and f', {config.split}'}) is empty: {setting}, "
            "expected at least 1"
        )
    if config.max_records is not None and config.max_records < len(source):
        source = _First(source, config.max_records)
    return EachText(source, config.kind) if config.expand == "text" else source


def parse_spec(spec: str, **settings: Any) -> SourceConfig:
    """The source that "FORMAT:PATH" stands for, with further settings.

    Raises:
        DataError: an unknown format, with the nearest name.
    """
    format, colon, path = spec.partition(":")
    if not colon or format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise DataError(f"'{spec}' is no FORMAT:PATH with a known format: {hint}(valid: {', '.join(FORMATS)})")
    return SourceConfig(format=cast(Format, format), path=path, **settings)


_OPTIONAL = frozenset({"path", "media", "split", "seed", "label"})


class _First:
    """The first records of a source."""

    def __init__(self, source: Source, size: int) -> None:
        self._source, self._size = source, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._size:
            raise IndexError(f"record {index} of {self._size}")
        return self._source[index]


@dataclasses.dataclass(frozen=True)
class Opener:
    """How a format opens, and which of a source's optional settings it reads."""

    open: Callable[[SourceConfig, VisualConfig], Source]
    reads: frozenset[str]


def _digitworld(config: SourceConfig, visual: VisualConfig) -> Source:
    return DigitWorld(
        config.kind,
        split=config.split or "train",
        seed=config.seed,
        size=100_000 if config.max_records is None else config.max_records,
        image_size=visual.image_size,
        num_frames=visual.num_frames,
        label=config.label,
    )


def _annotations(form: AnnotationFormat) -> Opener:
    reads = {"path", "media", "split"} if form.splits else {"path", "media"}

    def open(config: SourceConfig, visual: VisualConfig) -> Source:
        del visual
        return AnnotationSource(form, config.path, config.media, config.split, config.kind)

    return Opener(open, frozenset(reads))


FORMATS: Mapping[Format, Opener] = {
    "annotations": _annotations(fields.FORM),
    "array_record": Opener(lambda config, visual: ArrayRecordSource(config.path), frozenset({"path"})),
    "coco_captions": _annotations(pictures.COCO),
    "digitworld": Opener(_digitworld, frozenset({"split", "seed", "label"})),
    "files": Opener(lambda config, visual: LooseFiles(config.path, config.kind), frozenset({"path"})),
    "glue": Opener(_annotations(glue.FORM).open, frozenset({"path"})),
    "image_folder": Opener(lambda config, visual: pictures.ImageFolder(config.path, config.kind), frozenset({"path"})),
    "karpathy": _annotations(pictures.KARPATHY),
    "kinetics": _annotations(pictures.KINETICS),
    "ssv2": _annotations(pictures.SSV2),
    "tfds": Opener(
        lambda config, visual: TfdsSource(config.path, config.split or "train", config.kind),
        frozenset({"path", "split"}),
    ),
    "vqa_v2": _annotations(pictures.VQA),
    "webdataset": Opener(lambda config, visual: WebDatasetSource(config.path, config.kind), frozenset({"path"})),
}
"""Every format of :data:`Format`."""
