"""The metrics of GLUE's tasks (arXiv 1804.07461, table 1), except WNLI, which papers omit."""

import numpy as np
from jaxtyping import Real

from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.metrics.classification import check_classes
from mplug2_jax.metrics.correlation import Correlation
from mplug2_jax.metrics.metric import MeanMetric, Metric
from mplug2_jax.metrics.validation import check_same_length

NUM_CLASSES = {"cola": 2, "sst2": 2, "mrpc": 2, "qqp": 2, "mnli": 3, "qnli": 2, "rte": 2}
"""Number of classes by task; STS-B is a regression instead."""
MAX_SIMILARITY = 5
"""STS-B's largest label; its smallest is 0."""


def glue_metrics(
    task: str, predictions: Real[np.ndarray, " n"], labels: Real[np.ndarray, " labels"]
) -> dict[str, Metric]:
    """Return a task's metrics by name: Matthews' for CoLA, Pearson's and Spearman's for STS-B, accuracy for the others.

    MRPC and QQP also have the F1 of class 1 (paraphrases), which is 0 without any example or prediction of that class.
    MNLI's matched and mismatched sets are scored alike.

    Raises:
        UserError: an unknown task, different numbers of predictions and labels, or values outside the task's range.
    """
    if task not in (*NUM_CLASSES, "stsb"):
        raise UserError(f"GLUE: task '{task}' is unknown: {did_you_mean(task, (*NUM_CLASSES, 'stsb'))}")
    check_same_length(f"GLUE {task}", predictions=len(predictions), labels=len(labels))
    if task == "stsb":
        if not ((labels >= 0) & (labels <= MAX_SIMILARITY)).all():
            raise UserError(
                f"GLUE stsb: labels range from {labels.min():g} to {labels.max():g}, expected 0 to {MAX_SIMILARITY}; "
                "if all are -1, the labels of this test set are not public: score the validation set"
            )
        return {
            "pearson": Correlation(predictions, labels), "spearman": Correlation(predictions, labels, of_ranks=True)
        }  # fmt: skip
    for what, values in (("predictions", predictions), ("labels", labels)):
        check_classes(f"GLUE {task}", what, values, NUM_CLASSES[task])
    if task == "cola":
        return {"matthews": Correlation(predictions, labels)}
    metrics: dict[str, Metric] = {"accuracy": MeanMetric((predictions == labels).astype(np.float64))}
    if task in ("mrpc", "qqp"):
        metrics["f1"] = MeanMetric(2.0 * (predictions * labels), (predictions + labels).astype(np.float64))
    return metrics
