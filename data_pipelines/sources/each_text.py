"""Every text of a source's records as a record of its own, where none may go unread."""

import dataclasses

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.record import Record, Source
from data_pipelines.sources.config import SourceConfig
from data_pipelines.visual import VisualConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EachText(SourceConfig):
    """A source of texts, or else of captions. The texts of a record that has several get the keys KEY#0, KEY#1, ...

    All records are read once when it is opened, to count them.
    """

    def open(self, visual: VisualConfig) -> Source:
        """As :meth:`SourceConfig.open`."""
        return _EachText(super().open(visual))


class _EachText:
    def __init__(self, source: Source) -> None:
        self._source = source
        self._stops = np.cumsum([self._count(index) for index in range(len(source))])

    def _count(self, index: int) -> int:
        """Texts of a record; one that cannot be read or has none counts once, so that it is missed where it stands."""
        try:
            return max(1, len(_texts(self._source[index])))
        except DataError:
            return 1

    def __len__(self) -> int:
        return int(self._stops[-1])

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        place = int(np.searchsorted(self._stops, index, side="right"))
        record = self._source[place]
        texts, number = _texts(record), index - int(self._stops[place - 1] if place else 0)
        return Record(
            record.key if len(texts) < 2 else f"{record.key}#{number}",
            texts=texts[number : number + 1], tokens=record.tokens, tokenizer=record.tokenizer,
        )  # fmt: skip


def _texts(record: Record) -> tuple[str, ...]:
    return record.texts or record.captions
