"""Sources with one record per text, where every text must be read."""

import dataclasses

import numpy as np

from data_pipelines.config import Kind
from data_pipelines.errors import DataError
from data_pipelines.record import Record, Source, check_index


class OneTextPerRecord:
    """One record per caption of an image or video, or per text (without texts: caption) of a text record.

    The texts of a record with several get the keys KEY#0, KEY#1, ..., and share its ``visual_id``. All records are
    read once on opening, to count them.
    """

    def __init__(self, source: Source, kind: Kind) -> None:
        self._source, self._kind = source, kind
        self._stops = np.cumsum([self._count(index) for index in range(len(source))])

    def _count(self, index: int) -> int:
        """Return the number of texts of a record; 1 if it is unusable or has none, so that its error is reported."""
        try:
            return max(1, len(self._texts(self._source[index])))
        except DataError:
            return 1

    def _texts(self, record: Record) -> tuple[str, ...]:
        return (record.texts or record.captions) if self._kind == "text" else record.captions

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getitem__(self, index: int) -> Record:
        check_index(index, len(self), "text")
        row = int(np.searchsorted(self._stops, index, side="right"))
        record = self._source[row]
        texts, number = self._texts(record), index - int(self._stops[row - 1] if row else 0)
        key = record.key if len(texts) < 2 else f"{record.key}#{number}"
        text = texts[number : number + 1]
        if self._kind == "text":
            return Record(key, texts=text, tokens=record.tokens, tokenizer=record.tokenizer)
        return dataclasses.replace(record, key=key, visual_id=record.visual_id or record.key, captions=text)
