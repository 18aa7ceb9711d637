"""Sources with one record per text, where every text must be read."""

import array
import dataclasses
import itertools

from data_pipelines.config import Kind
from data_pipelines.errors import DataError
from data_pipelines.record import Record, Source, locate


class OneTextPerRecord:
    """One record per caption of an image or video, or per text (without texts: caption) of a text record.

    The texts of a record with several get the keys KEY#0, KEY#1, ..., and share its ``visual_id``. All records are
    read once on opening, to count them.
    """

    def __init__(self, source: Source, kind: Kind) -> None:
        self._source, self._kind = source, kind
        self._ends = array.array("q", itertools.accumulate(map(self._count, range(len(source)))))

    def _count(self, index: int) -> int:
        """Return the number of texts of a record; 1 if it is unusable or has none, so that its error is reported."""
        try:
            return max(1, len(self._texts(self._source[index])))
        except DataError:
            return 1

    def _texts(self, record: Record) -> tuple[str, ...]:
        return (record.texts or record.captions) if self._kind == "text" else record.captions

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        row, number = locate(index, self._ends, "text")
        record = self._source[row]
        texts = self._texts(record)
        key = record.key if len(texts) < 2 else f"{record.key}#{number}"
        text = texts[number : number + 1]
        if self._kind == "text":
            return Record(key, texts=text, tokens=record.tokens, tokenizer=record.tokenizer)
        return dataclasses.replace(record, key=key, visual_id=record.visual_id or record.key, captions=text)
