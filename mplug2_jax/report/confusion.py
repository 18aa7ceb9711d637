"""Confusions between classes as plain data: a matrix for few classes, the most frequent mistakes for many."""

import dataclasses
from collections.abc import Sequence
from typing import Any

_MAX_SHOWN = 20  # classes of a matrix, and listed mistakes


@dataclasses.dataclass(frozen=True)
class Cell:
    """The number of examples of a row's class that were predicted as a column's, and its percentage of the row."""

    count: int
    percent: float
    correct: bool


@dataclasses.dataclass(frozen=True)
class Confusion:
    """A matrix with a row for each reference class; or a list of mistakes: reference, prediction, count."""

    classes: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    mistakes: Sequence[tuple[str, str, int]]


def read_confusion(content: Any) -> Confusion | None:
    """Return the confusions of an evaluation's file; None if it has none.

    Raises:
        ValueError, TypeError, KeyError: neither a matrix of counts nor a list of mistakes.
    """
    if content is None:
        return None
    if "mistakes" in content:
        mistakes = [
            (str(reference), str(prediction), int(count))
            for reference, prediction, count in content["mistakes"][:_MAX_SHOWN]
        ]
        return Confusion((), (), mistakes)
    classes, counts = [str(name) for name in content["classes"]], [[int(n) for n in row] for row in content["counts"]]
    if len(classes) > _MAX_SHOWN or [len(row) for row in counts] != [len(classes)] * len(classes):
        raise ValueError(f"the confusion matrix of {len(classes)} classes is not a square of at most {_MAX_SHOWN}")
    if any(count < 0 for row in counts for count in row):
        raise ValueError("the confusion matrix has a negative count")
    return Confusion(
        classes,
        [
            [Cell(count, round(100 * count / (sum(row) or 1), 1), i == j) for j, count in enumerate(row)]
            for i, row in enumerate(counts)
        ],
        (),
    )
