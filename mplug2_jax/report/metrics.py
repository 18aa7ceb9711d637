"""``metrics.jsonl`` as curves of bounded size, however long the run was."""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from data_pipelines.storage.jsonl import iterate_jsonl

MAX_POINTS = 400  # a curve is drawn some 300 pixels wide
_CHUNK = 10_000  # lines in memory at a time

Bins = Float[np.ndarray, "_ 6"]
_FIRST, _LAST, _TOTAL, _COUNT, _LOW, _HIGH = range(6)


class Curve:
    """A metric over steps: at most ``MAX_POINTS`` bins of consecutive values, each with its mean and its extremes.

    Extremes are recorded because a mean over a thousand steps hides the one step that went wrong.
    """

    def __init__(self) -> None:
        self._stride = 1
        self._bins: Bins = np.empty((0, 6))
        self.not_finite = 0
        self.last = math.nan  # the last finite value

    def extend(self, steps: list[int], values: list[float]) -> None:
        """Append values in the order of their steps; of several values of one step the last counts."""
        step, value = np.array(steps, np.float64), np.array(values, np.float64)
        # An evaluation that is repeated on a finished run repeats its step.
        is_last = np.append(np.diff(step) != 0, True)
        step, value = step[is_last], value[is_last]
        finite = np.isfinite(value)
        self.not_finite += int((~finite).sum())
        if finite.any():
            self.last = float(value[finite][-1])
        extreme = np.where(finite, value, np.nan)
        new = np.stack([step, step, np.where(finite, value, 0), finite, extreme, extreme], axis=1)
        self._bins = np.concatenate([self._bins, _merge(new, self._stride)])
        while len(self._bins) > MAX_POINTS:
            self._bins = _merge(self._bins, 2)
            self._stride *= 2

    def __len__(self) -> int:
        """Return the number of bins."""
        return len(self._bins)

    @property
    def binned(self) -> bool:
        """Return whether a point represents several values."""
        return self._stride > 1

    @property
    def steps(self) -> Float[np.ndarray, " n"]:
        """Return the middle of each bin."""
        return (self._bins[:, _FIRST] + self._bins[:, _LAST]) / 2

    @property
    def means(self) -> Float[np.ndarray, " n"]:
        """Return the mean of each bin's finite values; NaN, which leaves a gap in the line, if it has none."""
        count = self._bins[:, _COUNT]
        return np.where(count > 0, self._bins[:, _TOTAL] / np.maximum(count, 1), np.nan)

    @property
    def lows(self) -> Float[np.ndarray, " n"]:
        """Return the minimum of each bin."""
        return self._bins[:, _LOW]

    @property
    def highs(self) -> Float[np.ndarray, " n"]:
        """Return the maximum of each bin."""
        return self._bins[:, _HIGH]


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The contents of metrics files."""

    curves: dict[str, Curve]
    last_step: int = 0
    damaged: int = 0  # lines


def read_metrics(*paths: Path) -> Metrics:
    """Read metrics files as streams, merged by step; a file that does not exist yet is empty."""
    curves: dict[str, Curve] = {}
    last_step = damaged = 0
    lines = heapq.merge(*map(_iterate_steps, paths), key=lambda line: line[0])
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


def _iterate_steps(path: Path) -> Iterator[tuple[int, dict[str, float] | None]]:
    """Yield each line's step and values; a damaged line has the step before it, and None as values."""
    step = 0
    for line in iterate_jsonl(path):
        try:
            step, row = _parse(line)
        except (ValueError, TypeError, OverflowError):
            row = None
        yield step, row


def _parse(line: dict[str, Any] | None) -> tuple[int, dict[str, float]]:
    """Return a line's step and values; null, which stands for a value that is not finite, becomes NaN."""
    if line is None or not isinstance(line.get("step"), int):
        raise ValueError("no step")
    float(line["step"])  # an integer in JSON may be larger than any float
    return line.pop("step"), {name: math.nan if value is None else float(value) for name, value in line.items()}


def _merge(bins: Bins, group: int) -> Bins:
    """Merge every ``group`` consecutive bins into one; the last group may be smaller."""
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
