"""``metrics.jsonl`` as curves of bounded size, however long the run was."""

import dataclasses
import heapq
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float

MAX_POINTS = 400  # a curve is drawn some 300 pixels wide
_CHUNK = 10_000  # lines held at a time

Bins = Float[np.ndarray, "_ 6"]
_FIRST, _LAST, _TOTAL, _COUNT, _LOW, _HIGH = range(6)


class Curve:
    """A metric over steps: at most ``MAX_POINTS`` bins of consecutive values, each with its mean and its extremes.

    The extremes are kept because a mean over a thousand steps hides the one step that went wrong.
    """

    def __init__(self) -> None:
        self._stride = 1
        self._bins: Bins = np.empty((0, 6))
        self.not_finite = 0
        self.last = math.nan  # the last finite value, as it was written

    def extend(self, steps: list[int], values: list[float]) -> None:
        """Adds values in the order of their steps; of several for one step the last counts."""
        at, value = np.array(steps, np.float64), np.array(values, np.float64)
        # An evaluation that is run again on a finished run repeats its step.
        kept = np.append(np.diff(at) != 0, True)
        at, value = at[kept], value[kept]
        finite = np.isfinite(value)
        self.not_finite += int((~finite).sum())
        if finite.any():
            self.last = float(value[finite][-1])
        seen = np.where(finite, value, np.nan)
        new = np.stack([at, at, np.where(finite, value, 0), finite, seen, seen], axis=1)
        self._bins = np.concatenate([self._bins, _merge(new, self._stride)])
        while len(self._bins) > MAX_POINTS:
            self._bins = _merge(self._bins, 2)
            self._stride *= 2

    def __len__(self) -> int:
        """The number of bins."""
        return len(self._bins)

    @property
    def binned(self) -> bool:
        """Whether points stand for several values each."""
        return self._stride > 1

    @property
    def steps(self) -> Float[np.ndarray, " n"]:
        """The middle of each bin."""
        return (self._bins[:, _FIRST] + self._bins[:, _LAST]) / 2

    @property
    def means(self) -> Float[np.ndarray, " n"]:
        """The mean of each bin's finite values; NaN where there is none, which leaves a gap in the line."""
        count = self._bins[:, _COUNT]
        return np.where(count > 0, self._bins[:, _TOTAL] / np.maximum(count, 1), np.nan)

    @property
    def lows(self) -> Float[np.ndarray, " n"]:
        """The least value of each bin."""
        return self._bins[:, _LOW]

    @property
    def highs(self) -> Float[np.ndarray, " n"]:
        """The greatest value of each bin."""
        return self._bins[:, _HIGH]


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What a metrics file holds."""

    curves: dict[str, Curve]
    last_step: int = 0
    damaged: int = 0  # lines that are no metrics, not counting a last line that is still being written


def read_metrics(*paths: Path) -> Metrics:
    """Reads metrics files as streams, one line by the other's steps; a file that is not there yet holds nothing."""
    curves: dict[str, Curve] = {}
    last_step = damaged = 0
    lines = heapq.merge(*map(_lines, paths), key=lambda line: line[0])
    while chunk := list(itertools.islice(lines, _CHUNK)):
        columns: dict[str, tuple[list[int], list[float]]] = {}
        for step, row in chunk:
            last_step = max(last_step, step)
            damaged += row is None
            for name, value in (row or {}).items():
                steps, values = columns.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
        for name, (steps, values) in columns.items():
            curves.setdefault(name, Curve()).extend(steps, values)
    return Metrics(curves, last_step, damaged)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, float] | None]]:
    """Every line's step and values; a damaged line has the step before it, and no values."""
    if not path.is_file():
        return
    step = 0
    with path.open("rb") as file:
        for line in file:
            try:
                step, row = _parse(line)
            except (ValueError, TypeError, OverflowError, RecursionError):
                if line.endswith(b"\n") and line.strip():
                    yield step, None
                continue
            yield step, row


def _parse(line: bytes) -> tuple[int, dict[str, float]]:
    """A line's step and values; null, which stands for a number that is not finite, becomes NaN."""
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError("no step")
    float(row["step"])  # a whole number in JSON may be beyond all floats
    return row.pop("step"), {name: math.nan if value is None else float(value) for name, value in row.items()}


def _merge(bins: Bins, group: int) -> Bins:
    """Every ``group`` consecutive bins become one; the last may take fewer."""
    starts = np.arange(0, len(bins), group)
    ends = np.minimum(starts + group, len(bins)) - 1
    return np.stack(
        [
            bins[starts, _FIRST], bins[ends, _LAST],
            np.add.reduceat(bins[:, _TOTAL], starts), np.add.reduceat(bins[:, _COUNT], starts),
            np.fmin.reduceat(bins[:, _LOW], starts), np.fmax.reduceat(bins[:, _HIGH], starts),
        ],
        axis=1,
    )  # fmt: skip
