"""Data sets that TFDS has prepared as ArrayRecord files, read without TensorFlow.

Features are recognized by their names, as in annotation files; class labels become their names. A video is a sequence
of encoded frames without times: 25 are a second, and only those that are selected are decoded.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from data_pipelines.config import Kind
from data_pipelines.errors import DataError, StorageUnavailableError
from data_pipelines.media import Media, mux_frames
from data_pipelines.record import Record, check_index, locate
from data_pipelines.sources.annotations import fields
from data_pipelines.sources.annotations.rows import Row
from data_pipelines.sources.annotations.source import MediaContext
from data_pipelines.sources.array_record_files import open_files
from data_pipelines.sources.files import find_files
from data_pipelines.storage.retry import is_transient

_MEDIA_NAMES = ("image", "video")
"""Features that hold the media of an example if it has several of a kind."""


class TfdsSource:
    """The examples of one split of a prepared data set.

    Args:
        path: the folder of a version, with ``dataset_info.json``.
        split: a split in TFDS's syntax ("train", "test[:10%]").
        kind: what the records are read as.

    Raises:
        DataError: TFDS is not installed, or the folder has no data set of this file format, or no such split.
    """

    def __init__(self, path: str, split: str, kind: Kind) -> None:
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise DataError(
                f"format 'tfds' needs tensorflow-datasets ({error}): pip install tensorflow-datasets"
            ) from error
        try:
            with _videos_without_tensorflow():
                builder = tfds.builder_from_directory(path)
        except Exception as error:  # OSError, ValueError and others for missing or damaged files
            _check_storage(error, path)
            raise DataError(
                f"{path} is not a TFDS data set ({_reason(error)}); expected a folder with dataset_info.json, like "
                "DATA_DIR/NAME/1.0.0"
            ) from error
        info = builder.info
        if split.partition("[")[0] not in info.splits:
            raise DataError(f"{path} has no split '{split}'; valid: {', '.join(info.splits)}")

        class KeepFrames(tfds.decode.SkipDecoding):
            """Return the encoded frames of a video."""

            def decode_batch_example_np(self, frames: Any) -> Any:
                return frames

        # Images stay encoded: they are decoded when the record is used, at the size that is needed.
        kinds = {"image": (tfds.features.Image, tfds.decode.SkipDecoding), "video": (tfds.features.Video, KeepFrames)}
        self._media: dict[str, Literal["image", "video"]] = {
            name: kind for name, feature in info.features.items() for kind, (type_, _) in kinds.items()
            if isinstance(feature, type_)
        }  # fmt: skip
        skip = {name: kinds[kind][1]() for name, kind in self._media.items()}
        try:
            self._examples = builder.as_data_source(split, decoders=skip)
            parts = tfds.core.data_sources.base.file_instructions(info, split)
        except Exception as error:  # NotImplementedError for other formats, ValueError for an invalid slice, ...
            _check_storage(error, path)
            raise DataError(
                f"split '{split}' of {path} cannot be read ({_reason(error)}); prepare the data set with "
                "file_format='array_record'"
            ) from error
        self._examples.data_source = _Examples(path, parts)  # the library's does not retry failed reads
        labels = {
            name: feature for name, feature in info.features.items() if isinstance(feature, tfds.features.ClassLabel)
        }
        self._labels: Mapping[str, Sequence[str]] = {name: feature.names for name, feature in labels.items()}
        self._name, self._context = f"{info.full_name}/{split}", MediaContext(path, kind)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Record:
        check_index(index, len(self), "example")
        key = f"{self._name}/{index}"
        try:
            example = dict(self._examples[index])
        except (StorageUnavailableError, PermissionError):
            raise
        except Exception as error:  # protobuf raises various errors
            raise DataError(f"example {key} is damaged ({_reason(error)})") from error
        media = {name: example.pop(name) for name in self._media}
        values = {name: self._to_json(name, value) for name, value in example.items()}
        record = fields.to_record(Row(self._name, index + 1, values), self._context)
        return dataclasses.replace(record, key=key, visual_id="", media=self._select_media(media, key))

    def _select_media(self, encoded: Mapping[str, Any], key: str) -> Media | None:
        """Return the feature of the requested kind, or else the first, which a check of the kind reports."""
        if not encoded or self._context.kind == "text":
            return None
        names = sorted(encoded, key=lambda name: (self._media[name] != self._context.kind, name not in _MEDIA_NAMES))
        kind, data = self._media[names[0]], encoded[names[0]]
        where = f"{key}/{names[0]}"
        return Media(kind, data if kind == "image" else mux_frames(list(data), where), where)

    def _to_json(self, name: str, value: Any) -> Any:
        """Return a feature's value as annotation files have it."""
        if name in self._labels:
            return self._labels[name][int(value)] if int(value) >= 0 else None
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        if isinstance(value, Mapping):  # a sequence of features, read for their texts
            return self._to_json(name, value.get("text", value.get("raw", ())))
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, list | tuple):
            return [self._to_json("", item) for item in value]
        return value


class _Examples:
    """The serialized examples of a split, which consists of parts of files."""

    def __init__(self, folder: str, parts: Sequence[Any]) -> None:
        found = {PurePosixPath(file.path).name: file for file in find_files(folder, "")}
        self._parts = parts
        self._files = open_files([found[PurePosixPath(part.filename).name] for part in parts])
        self._ends = list(itertools.accumulate(part.take for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> bytes:
        part, row = locate(index, self._ends, "example")
        return self._files[part][self._parts[part].skip + row]


@contextlib.contextmanager
def _videos_without_tensorflow() -> Iterator[None]:
    """Let TFDS describe videos without TensorFlow, of which it needs only the name of a dtype."""
    from tensorflow_datasets.core.features import video_feature

    tensorflow = video_feature.tf
    video_feature.tf = SimpleNamespace(dtypes=SimpleNamespace(as_dtype=np.dtype))
    try:
        yield
    finally:
        video_feature.tf = tensorflow


def _check_storage(error: Exception, path: str) -> None:
    """Raise StorageUnavailableError for an error that the library made of one."""
    if is_transient(error):
        raise StorageUnavailableError(f"{path} cannot be read ({_reason(error)}); start again later") from error


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
