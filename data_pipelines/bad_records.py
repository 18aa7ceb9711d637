"""Unusable records: replaced, counted and logged; too many of them stop the run.

Whether a run stops depends on its data, not on which host read what: the counts of all hosts are added up, and must
exceed the allowed fraction by more than chance explains.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from data_pipelines.errors import DataError
from data_pipelines.storage.jsonl import JsonlWriter, read_jsonl

MAX_LINES = 10_000
"""Lines of a ``data-errors.jsonl``; further bad records are still counted."""
SIGNIFICANCE_LEVEL = 1e-6
"""Probability with which data as bad as allowed may stop a run at one of its checks."""
MAX_EXAMPLES = 5
"""Bad records that an error lists."""


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used, and why."""

    source: str
    key: str  # the record's key, or "record INDEX" where the key cannot be read
    reason: str


class BadRecordCounts(NamedTuple):
    """The records of a source that were requested, those of them that cannot be used, and the fraction allowed."""

    requested: int
    bad: int
    max_fraction: float


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
        self._writer = JsonlWriter(path)
        self._logged = set(read_bad_records(path))
        self._max_fractions: dict[str, float] = {}

    def record(self, source: str, bad_records: Sequence[BadRecord], max_fraction: float) -> None:
        """Count one requested record of a source, and the bad records that were skipped to find a good one.

        Args:
            source: its name.
            bad_records: the records that failed.
            max_fraction: the fraction of bad records in a source that :meth:`check` allows.
        """
        self._max_fractions[source] = max_fraction
        self._num_requested[source] += 1 + len(bad_records)
        self._num_skipped[source] += len(bad_records)
        for bad_record in bad_records:
            self._num_skipped_since[source] += 1
            self._append(bad_record)

    def counts(self) -> Mapping[str, BadRecordCounts]:
        """Return the counts of each source so far."""
        return {
            source: BadRecordCounts(self._num_requested[source], self._num_skipped[source], max_fraction)
            for source, max_fraction in self._max_fractions.items()
        }

    def check(self, counts: Sequence[Mapping[str, Sequence[float | int]]]) -> None:
        """Check that no source has significantly more bad records than allowed, over all processes.

        Args:
            counts: :meth:`counts` of each process.

        Raises:
            DataError: too many bad records; lists the first few.
        """
        for source in sorted({source for each in counts for source in each}):
            # They may come as JSON, which has no tuples.
            found = [BadRecordCounts._make(each[source]) for each in counts if source in each]
            requested, bad = sum(each.requested for each in found), sum(each.bad for each in found)
            if exceeds_fraction(bad, requested, max_fraction := found[0].max_fraction):
                known = [bad_record for bad_record in self._logged if bad_record.source == source]
                raise _too_many_error(known, source, bad, requested, max_fraction, f"; all in {self._path}")

    def drain_skipped(self) -> Mapping[str, int]:
        """Return the number of records skipped since the last call, for each source that had any."""
        skipped, self._num_skipped_since = self._num_skipped_since, collections.Counter()
        return skipped

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _append(self, bad_record: BadRecord) -> None:
        if bad_record in self._logged or len(self._logged) >= MAX_LINES:
            return
        self._logged.add(bad_record)
        self._writer.write(dataclasses.asdict(bad_record))


def exceeds_fraction(bad: int, requested: int, max_fraction: float) -> bool:
    """Return whether a one-sided binomial test rejects a bad fraction of at most ``max_fraction``."""
    if not bad or bad <= max_fraction * requested:
        return False
    from scipy.special import bdtrc  # imported here: nearly no process needs it

    return not max_fraction or float(bdtrc(bad - 1, requested, max_fraction)) < SIGNIFICANCE_LEVEL


def check_bad_fraction(bad_records: Sequence[BadRecord], num_requested: int, max_fraction: float) -> None:
    """Check that at most a fraction of the requested records is bad.

    Raises:
        DataError: too many bad records; lists the first few.
    """
    if len(bad_records) > max_fraction * num_requested:
        raise _too_many_error(bad_records, bad_records[0].source, len(bad_records), num_requested, max_fraction)


def _too_many_error(
    known: Sequence[BadRecord], source: str, num_skipped: int, num_requested: int, max_fraction: float, where: str = ""
) -> DataError:
    listing = "; ".join(f"{record.key}: {record.reason}" for record in sorted(known, key=str)[:MAX_EXAMPLES])
    return DataError(
        f"{num_skipped} of {num_requested} records of source '{source}' cannot be used, more than "
        f"max_bad_fraction={max_fraction:g} allows ({listing or 'read by other hosts'}{where}); fix the source, or "
        "raise max_bad_fraction"
    )


def read_bad_records(path: Path) -> list[BadRecord]:
    """Return the bad records of a file; skip damaged lines."""
    bad_records = []
    for line in read_jsonl(path):
        with contextlib.suppress(TypeError):
            bad_records.append(BadRecord(**line))
    return bad_records
