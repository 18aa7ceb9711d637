"""Which classes were taken for which, as plain data: a matrix of few classes, the most frequent mistakes of many."""

import dataclasses
from collections.abc import Sequence
from typing import Any

_MOST = 20  # classes of a matrix, and mistakes that are listed


@dataclasses.dataclass(frozen=True)
class Cell:
    """How many examples of a row's class were taken for a column's, and which percentage of the row that is."""

    count: int
    share: float
    right: bool


@dataclasses.dataclass(frozen=True)
class Confusion:
    """A matrix, one row for each true class; or mistakes: true class, what it was taken for, how often."""

    classes: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    mistakes: Sequence[tuple[str, str, int]]


def read_confusion(content: Any) -> Confusion | None:
    """What an evaluation's file says; None of one that says nothing.

    Raises:
        ValueError, TypeError, KeyError: anything else than a matrix of counts or a list of mistakes.
    """
    if content is None:
        return None
    if "mistakes" in content:
        rows = [(str(true), str(taken), int(count)) for true, taken, count in content["mistakes"][:_MOST]]
        return Confusion((), (), rows)
    classes, counts = [str(name) for name in content["classes"]], [[int(n) for n in row] for row in content["counts"]]
    if len(classes) > _MOST or [len(row) for row in counts] != [len(classes)] * len(classes):
        raise ValueError(f"the confusion of {len(classes)} classes is no matrix of at most {_MOST}")
    if any(count < 0 for row in counts for count in row):
        raise ValueError("the confusion counts less than nothing")
    return Confusion(
        classes,
        [
            [Cell(count, round(100 * count / (sum(row) or 1), 1), i == j) for j, count in enumerate(row)]
            for i, row in enumerate(counts)
        ],
        (),
    )
