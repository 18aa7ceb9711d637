"""Classification metrics: top-k accuracy, averages over views, and confusion between classes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Real

from mplug2_jax.errors import UserError
from mplug2_jax.metrics.metric import MeanMetric
from mplug2_jax.metrics.validation import check_same_length

MAX_CLASSES_IN_MATRIX = 20
"""Up to this many classes have a confusion matrix; of more, as many of the most frequent mistakes are listed."""


def top_k_accuracy(scores: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " labels"], k: int) -> MeanMetric:
    """Return the fraction of examples whose label is among the k highest scores. Ties and NaN count as errors.

    Raises:
        UserError: the numbers of rows and labels differ, or a label is not a class.
    """
    check_same_length(f"top-{k} accuracy", predictions=len(scores), labels=len(labels))
    check_classes(f"top-{k} accuracy", "labels", labels, scores.shape[1])
    label_scores = np.take_along_axis(scores, labels[:, None], axis=1)
    rank = (~(scores < label_scores)).sum(1) - 1  # the label itself is not ranked before itself
    return MeanMetric((rank < k).astype(np.float64))


def average_views(
    probabilities: Float[np.ndarray, "views c"], ids: Int[np.ndarray, " ids"], examples: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n c"]:
    """Return each example's probabilities: the mean over the rows with its id, in the order of ``examples``.

    Raises:
        UserError: the numbers of rows and ids differ, an example is repeated or has no view, or a view has no example.
    """
    check_same_length("views", predictions=len(probabilities), ids=len(ids))
    view_ids, id_index = np.unique(ids, return_inverse=True)
    example_ids, position = np.unique(examples, return_index=True)
    if len(example_ids) < len(examples):
        raise UserError(f"views: {len(examples)} examples have only {len(example_ids)} ids; expected distinct ids")
    if len(missing := np.setdiff1d(example_ids, view_ids)):
        raise UserError(f"views: {len(missing)} of {len(example_ids)} examples have none, first id {missing[0]}")
    if len(extra := np.setdiff1d(view_ids, example_ids)):
        raise UserError(f"views: {len(extra)} of their ids are of no example, first id {extra[0]}")
    total = np.zeros((len(view_ids), probabilities.shape[1]))
    np.add.at(total, id_index, probabilities)
    means = np.empty_like(total)
    means[position] = total / np.bincount(id_index)[:, None]
    return means


def confusion_matrix(
    predictions: Int[np.ndarray, " n"], labels: Int[np.ndarray, " labels"], classes: int
) -> Int[np.ndarray, "classes classes"]:
    """Return how many examples of each class (row) were predicted as each class (column).

    Raises:
        UserError: the numbers of predictions and labels differ, or either has a value that is not a class.
    """
    check_same_length("confusion", predictions=len(predictions), labels=len(labels))
    check_classes("confusion", "predictions", predictions, classes)
    check_classes("confusion", "labels", labels, classes)
    return np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)


@dataclasses.dataclass(frozen=True)
class ConfusionSummary:
    """The confused classes: a matrix of few classes, only the most frequent mistakes of many."""

    classes: Sequence[str] = ()
    counts: Int[np.ndarray, "c c"] | None = None  # true classes in rows, predicted classes in columns
    mistakes: Sequence[tuple[str, str, int]] = ()  # true class, predicted class, count

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        if self.counts is None:
            return {"mistakes": list(self.mistakes)}
        return {"classes": list(self.classes), "counts": self.counts.tolist()}


def confusion_summary(
    predictions: Int[np.ndarray, " n"], labels: Int[np.ndarray, " labels"], classes: Sequence[str]
) -> ConfusionSummary:
    """Return which classes, by name, were confused. Raises UserError as :func:`confusion_matrix`."""
    if len(classes) <= MAX_CLASSES_IN_MATRIX:
        return ConfusionSummary(classes, confusion_matrix(predictions, labels, len(classes)))
    check_same_length("confusion", predictions=len(predictions), labels=len(labels))
    wrong = np.stack([labels, predictions], axis=1)[predictions != labels]
    pairs, counts = np.unique(wrong, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MAX_CLASSES_IN_MATRIX]  # ties in the order of the classes
    rows = zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    return ConfusionSummary(mistakes=[(classes[true], classes[predicted], n) for (true, predicted), n in rows])


def check_classes(metric: str, what: str, values: Real[np.ndarray, " n"], classes: int) -> None:
    """Check that all values are classes, 0 to ``classes`` - 1.

    Raises:
        UserError: names the metric, the first invalid value and the valid range.
    """
    wrong = np.flatnonzero(~np.isin(values, np.arange(classes)))
    if len(wrong):
        raise UserError(
            f"{metric}: {what}[{wrong[0]}] is {values[wrong[0]]}, expected a class from 0 to {classes - 1}; "
            "if all labels are -1, the labels of this test set are not public: score the validation set"
        )
