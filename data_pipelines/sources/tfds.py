"""Data sets that TFDS has prepared as ArrayRecord files, read without TensorFlow.

Features are taken for what their names say, as in annotation files; class labels become their names.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.config import Kind
from data_pipelines.errors import DataError
from data_pipelines.media import Media
from data_pipelines.record import Record
from data_pipelines.sources.annotations import fields
from data_pipelines.sources.annotations.rows import Row
from data_pipelines.sources.annotations.source import MediaContext


class TfdsSource:
    """The examples of one split of a prepared data set.

    Args:
        path: the folder of a version, the one that holds ``dataset_info.json``.
        split: a split, in TFDS's own words ("train", "test[:10%]").
        kind: what the records are taken for.

    Raises:
        DataError: TFDS is not installed, nothing is prepared there, it is of another file format, or has no such split.
    """

    def __init__(self, path: str, split: str, kind: Kind) -> None:
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise DataError(
                f"format 'tfds' needs tensorflow-datasets ({error}): pip install tensorflow-datasets"
            ) from error
        try:
            builder = tfds.builder_from_directory(path)
        except Exception as error:  # it raises its own, OSError and ValueError for what is missing or damaged
            raise DataError(
                f"{path} holds no data set of TFDS ({_reason(error)}); expected a folder with dataset_info.json, like "
                "DATA_DIR/NAME/1.0.0"
            ) from error
        info = builder.info
        if split.partition("[")[0] not in info.splits:
            raise DataError(f"{path} has no split '{split}'; valid: {', '.join(info.splits)}")
        # Pictures stay encoded: they are decoded once the record was chosen, at the size that is wanted.
        self._pictures = [name for name, feature in info.features.items() if isinstance(feature, tfds.features.Image)]
        skip = {name: tfds.decode.SkipDecoding() for name in self._pictures}
        try:
            self._examples = builder.as_data_source(split, decoders=skip)
        except Exception as error:  # NotImplementedError for other formats, ValueError for a wrong slice, ...
            raise DataError(
                f"split '{split}' of {path} cannot be read ({_reason(error)}); prepare the data set with "
                "file_format='array_record'"
            ) from error
        labels = {
            name: feature for name, feature in info.features.items() if isinstance(feature, tfds.features.ClassLabel)
        }
        self._labels: Mapping[str, Sequence[str]] = {name: feature.names for name, feature in labels.items()}
        self._name, self._place = f"{info.full_name}/{split}", MediaContext(path, kind)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        key = f"{self._name}/{index}"
        try:
            example = dict(self._examples[index])
        except Exception as error:  # damaged records raise what ArrayRecord and protobuf raise
            raise DataError(f"example {key} is damaged ({_reason(error)})") from error
        if all(value is None for value in example.values()):  # what the library makes of a file that is cut off
            raise DataError(f"example {key} is damaged; prepare the data set again")
        pictures = {name: example.pop(name) for name in self._pictures}
        values = {name: self._plain(name, value) for name, value in example.items()}
        record = fields.make(Row(self._name, index + 1, values), self._place)
        media = None
        if pictures and self._place.kind != "text":
            name = "image" if "image" in pictures else next(iter(pictures))
            media = Media("image", pictures[name], f"{key}/{name}")
        return dataclasses.replace(record, key=key, picture="", media=media)

    def _plain(self, name: str, value: Any) -> Any:
        """A feature's value as annotation files would write it."""
        if name in self._labels:
            return self._labels[name][int(value)] if int(value) >= 0 else None
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        if isinstance(value, Mapping):  # a sequence of named things, of which the texts count
            return self._plain(name, value.get("text", value.get("raw", ())))
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, list | tuple):
            return [self._plain("", each) for each in value]
        return value


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
