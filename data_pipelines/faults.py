"""Records that could not be used: replaced, counted, written down, and too many of them stop the run."""

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipelines.errors import DataError

MAX_LINES = 10_000
"""Of a ``data-errors.jsonl``; further faults are still counted."""
MAX_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Fault:
    """One record that could not be used."""

    source: str
    key: str  # the record's key, or its number in the source where not even that could be read
    reason: str


class FaultLog:
    """What became of the records that batches wanted, in the order of steps.

    Args:
        path: ``data-errors.jsonl``, appended to: every fault once, however often it comes back.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._wanted: collections.Counter[str] = collections.Counter()
        self._skipped: collections.Counter[str] = collections.Counter()
        self._fresh: collections.Counter[str] = collections.Counter()
        self._seen = set(read_faults(path))

    def take(self, source: str, faults: Sequence[Fault], max_share: float) -> None:
        """Counts one wanted record of a source, and those that failed before one was good.

        Args:
            source: its name.
            faults: the records that failed.
            max_share: of a source's records that may be unusable before the run stops. It is judged once so many were
                wanted that a single one is no larger a share.

        Raises:
            DataError: too many; names the first few.
        """
        self._wanted[source] += 1 + len(faults)
        self._skipped[source] += len(faults)
        for fault in faults:
            self._fresh[source] += 1
            self._write(fault)
        wanted = self._wanted[source]
        if self._skipped[source] > max_share * wanted and (wanted * max_share >= 1 or not max_share):
            known = [fault for fault in self._seen if fault.source == source]
            raise _too_many(known, self._skipped[source], wanted, max_share, f"; all in {self._path}")

    def skipped(self) -> Mapping[str, int]:
        """Records skipped since the last call, of the sources that had any."""
        fresh, self._fresh = self._fresh, collections.Counter()
        return fresh

    def _write(self, fault: Fault) -> None:
        if fault in self._seen or len(self._seen) >= MAX_LINES:
            return
        self._seen.add(fault)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(fault)) + "\n")


def check_share(faults: Sequence[Fault], wanted: int, max_share: float) -> None:
    """Checks that no more than a share of the wanted records failed.

    Raises:
        DataError: names the share and the first few.
    """
    if len(faults) > max_share * wanted:
        raise _too_many(faults, len(faults), wanted, max_share)


def _too_many(known: Sequence[Fault], skipped: int, wanted: int, max_share: float, where: str = "") -> DataError:
    listing = "; ".join(f"{fault.key}: {fault.reason}" for fault in sorted(known, key=str)[:MAX_NAMED])
    return DataError(
        f"{skipped} of {wanted} records of source '{known[0].source}' cannot be used, more than max_bad_fraction="
        f"{max_share:g} allows ({listing}{where}); mend the source, or raise max_bad_fraction"
    )


def read_faults(path: Path) -> list[Fault]:
    """The faults that a file holds; a line that a killed process cut is left out."""
    faults = []
    for text in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            faults.append(Fault(**json.loads(text)))
        except (ValueError, TypeError):
            continue
    return faults
