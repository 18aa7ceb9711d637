"""Classification scores: top-1 and top-5, of several views of a video too, and which classes are taken for which."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Real

from mplug2_jax.errors import UserError
from mplug2_jax.metrics.metric import MeanMetric
from mplug2_jax.metrics.validation import check_same_length

FEW = 20  # classes of which there is a matrix to look at, and mistakes that are listed of more


def top_k(scores: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " labels"], k: int) -> MeanMetric:
    """Share of examples whose class is among the k of highest score. Ties and NaN count against.

    Raises:
        UserError: not one row of scores to each label, or labels that are no class.
    """
    check_same_length(f"top-{k} accuracy", predictions=len(scores), labels=len(labels))
    check_classes(f"top-{k} accuracy", "labels", labels, scores.shape[1])
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = (~(scores < own)).sum(1) - 1  # itself is none of those before it
    return MeanMetric((before < k).astype(np.float64))


def average_views(
    probabilities: Float[np.ndarray, "views c"], ids: Int[np.ndarray, " ids"], examples: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n c"]:
    """Each example's probabilities: the mean over its views, the rows that have its id; in the order of ``examples``.

    Raises:
        UserError: not one id to each view, an example named twice, one without any view, or views of none.
    """
    check_same_length("views", predictions=len(probabilities), ids=len(ids))
    found, of_view = np.unique(ids, return_inverse=True)
    wanted, where = np.unique(examples, return_index=True)
    if len(wanted) < len(examples):
        raise UserError(f"views: {len(examples)} examples have only {len(wanted)} ids; each id names one example")
    if len(missing := np.setdiff1d(wanted, found)):
        raise UserError(f"views: {len(missing)} of {len(wanted)} examples have none, the first is id {missing[0]}")
    if len(extra := np.setdiff1d(found, wanted)):
        raise UserError(f"views: {len(extra)} of their ids are of no example, the first is {extra[0]}")
    total = np.zeros((len(found), probabilities.shape[1]))
    np.add.at(total, of_view, probabilities)
    means = np.empty_like(total)
    means[where] = total / np.bincount(of_view)[:, None]
    return means


def confusion_matrix(
    said: Int[np.ndarray, " n"], labels: Int[np.ndarray, " labels"], classes: int
) -> Int[np.ndarray, "classes classes"]:
    """How many examples of each class (row) were taken for each (column).

    Raises:
        UserError: not one prediction to each label, or either of them no class.
    """
    check_same_length("confusion", predictions=len(said), labels=len(labels))
    check_classes("confusion", "predictions", said, classes)
    check_classes("confusion", "labels", labels, classes)
    return np.bincount(labels * classes + said, minlength=classes**2).reshape(classes, classes)


@dataclasses.dataclass(frozen=True)
class ConfusionSummary:
    """Which classes were taken for which: of few classes a matrix, of many the most frequent mistakes alone."""

    classes: Sequence[str] = ()
    counts: Int[np.ndarray, "c c"] | None = None  # of each true class (row), how many were taken for each (column)
    mistakes: Sequence[tuple[str, str, int]] = ()  # true class, what it was taken for, how often

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        if self.counts is None:
            return {"mistakes": list(self.mistakes)}
        return {"classes": list(self.classes), "counts": self.counts.tolist()}


def confusion_summary(
    said: Int[np.ndarray, " n"], labels: Int[np.ndarray, " labels"], classes: Sequence[str]
) -> ConfusionSummary:
    """Which of the classes, by their names, were taken for which. Raises UserError as :func:`confusion`."""
    if len(classes) <= FEW:
        return ConfusionSummary(classes, confusion_matrix(said, labels, len(classes)))
    check_same_length("confusion", predictions=len(said), labels=len(labels))
    wrong = np.stack([labels, said], axis=1)[said != labels]
    pairs, counts = np.unique(wrong, axis=0, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:FEW]  # of equals the first classes
    rows = zip(pairs[most].tolist(), counts[most].tolist(), strict=True)
    return ConfusionSummary(mistakes=[(classes[true], classes[taken], count) for (true, taken), count in rows])


def check_classes(metric: str, what: str, values: Real[np.ndarray, " n"], classes: int) -> None:
    """Checks that all are 0 to classes - 1.

    Raises:
        UserError: names the metric, the first that is not, and what is valid.
    """
    wrong = np.flatnonzero(~np.isin(values, np.arange(classes)))
    if len(wrong):
        raise UserError(
            f"{metric}: {what}[{wrong[0]}] is {values[wrong[0]]}, expected a class from 0 to {classes - 1}; "
            "if all labels are -1, they are a test set's, which are kept back: score the validation set"
        )
