"""Unusable records: replaced, counted and logged; too many of them stop the run."""

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_pipelines.errors import DataError

MAX_LINES = 10_000
"""Lines of a ``data-errors.jsonl``; further bad records are still counted."""
MAX_EXAMPLES = 5
"""Bad records that an error lists."""


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used, and why."""

    source: str
    key: str  # the record's key, or "record INDEX" where the key cannot be read
    reason: str


class BadRecordLog:
    """The bad records of a run, counted in the order of steps.

    Args:
        path: ``data-errors.jsonl``, appended to: every bad record once, however often it recurs.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_requested: collections.Counter[str] = collections.Counter()
        self._num_skipped: collections.Counter[str] = collections.Counter()
        self._num_skipped_since: collections.Counter[str] = collections.Counter()
        self._logged = set(read_bad_records(path))

    def record(self, source: str, bad_records: Sequence[BadRecord], max_fraction: float) -> None:
        """Count one requested record of a source, and the bad records that were skipped to find a good one.

        Args:
            source: its name.
            bad_records: the records that failed.
            max_fraction: stop the run above this fraction of bad records in a source. It is checked once enough
                records were requested that a single bad one does not exceed it.

        Raises:
            DataError: too many bad records; lists the first few.
        """
        self._num_requested[source] += 1 + len(bad_records)
        self._num_skipped[source] += len(bad_records)
        for bad_record in bad_records:
            self._num_skipped_since[source] += 1
            self._append(bad_record)
        requested = self._num_requested[source]
        if self._num_skipped[source] > max_fraction * requested and (requested * max_fraction >= 1 or not max_fraction):
            known = [bad_record for bad_record in self._logged if bad_record.source == source]
            raise _too_many(known, self._num_skipped[source], requested, max_fraction, f"; all in {self._path}")

    def drain_skipped(self) -> Mapping[str, int]:
        """Return the number of records skipped since the last call, for each source that had any."""
        skipped, self._num_skipped_since = self._num_skipped_since, collections.Counter()
        return skipped

    def _append(self, bad_record: BadRecord) -> None:
        if bad_record in self._logged or len(self._logged) >= MAX_LINES:
            return
        self._logged.add(bad_record)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(bad_record)) + "\n")


def check_bad_fraction(bad_records: Sequence[BadRecord], num_requested: int, max_fraction: float) -> None:
    """Check that at most a fraction of the requested records is bad.

    Raises:
        DataError: too many bad records; lists the first few.
    """
    if len(bad_records) > max_fraction * num_requested:
        raise _too_many(bad_records, len(bad_records), num_requested, max_fraction)


def _too_many(
    known: Sequence[BadRecord], num_skipped: int, num_requested: int, max_fraction: float, where: str = ""
) -> DataError:
    listing = "; ".join(f"{record.key}: {record.reason}" for record in sorted(known, key=str)[:MAX_EXAMPLES])
    return DataError(
        f"{num_skipped} of {num_requested} records of source '{known[0].source}' cannot be used, more than "
        f"max_bad_fraction={max_fraction:g} allows ({listing}{where}); fix the source, or raise max_bad_fraction"
    )


def read_bad_records(path: Path) -> list[BadRecord]:
    """Return the bad records of a file; skip a line that a killed process truncated."""
    bad_records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            bad_records.append(BadRecord(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return bad_records
