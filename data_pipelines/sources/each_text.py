"""Every text of a source's records as a record of its own, where none may go unread."""

import dataclasses

import numpy as np

from data_pipelines.config import Kind
from data_pipelines.errors import DataError
from data_pipelines.record import Record, Source


class EachText:
    """A record for every caption of a picture or clip, or for every text (or else caption) of texts.

    The texts of a record that has several get the keys KEY#0, KEY#1, ..., and show the same picture. All records are
    read once when it is opened, to count them.
    """

    def __init__(self, source: Source, kind: Kind) -> None:
        self._source, self._kind = source, kind
        self._stops = np.cumsum([self._count(index) for index in range(len(source))])

    def _count(self, index: int) -> int:
        """Texts of a record; one that cannot be read or has none counts once, so that it is missed where it stands."""
        try:
            return max(1, len(self._texts(self._source[index])))
        except DataError:
            return 1

    def _texts(self, record: Record) -> tuple[str, ...]:
        return (record.texts or record.captions) if self._kind == "text" else record.captions

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        place = int(np.searchsorted(self._stops, index, side="right"))
        record = self._source[place]
        texts, number = self._texts(record), index - int(self._stops[place - 1] if place else 0)
        key = record.key if len(texts) < 2 else f"{record.key}#{number}"
        own = texts[number : number + 1]
        if self._kind == "text":
            return Record(key, texts=own, tokens=record.tokens, tokenizer=record.tokenizer)
        return dataclasses.replace(record, key=key, picture=record.picture or record.key, captions=own)
