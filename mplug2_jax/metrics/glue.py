"""The scores that GLUE (arXiv 1804.07461, table 1) gives each of its tasks, except WNLI, which papers leave out."""

import numpy as np
from jaxtyping import Real

from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.metrics.classification import check_classes
from mplug2_jax.metrics.correlation import Correlation
from mplug2_jax.metrics.metric import MeanMetric, Metric
from mplug2_jax.metrics.validation import check_same_length

CLASSES = {"cola": 2, "sst2": 2, "mrpc": 2, "qqp": 2, "mnli": 3, "qnli": 2, "rte": 2}
"""How many each task tells apart; STS-B says a number instead."""
MAX_SIMILARITY = 5
"""STS-B's largest number; its smallest is 0."""


def glue_metrics(task: str, said: Real[np.ndarray, " n"], labels: Real[np.ndarray, " labels"]) -> dict[str, Metric]:
    """A task's figures by name, as fractions: Matthews of CoLA, Pearson and Spearman of STS-B, accuracy of the others.

    MRPC and QQP have F1 of class 1 (paraphrases) besides; 0 where nothing is of it, nor said to be. MNLI's two sets,
    matched and mismatched, are scored alike.

    Raises:
        UserError: an unknown task, not one prediction to each label, or what the task does not tell apart.
    """
    if task not in (*CLASSES, "stsb"):
        raise UserError(f"GLUE: task '{task}' is unknown: {did_you_mean(task, (*CLASSES, 'stsb'))}")
    check_same_length(f"GLUE {task}", predictions=len(said), labels=len(labels))
    if task == "stsb":
        if not ((labels >= 0) & (labels <= MAX_SIMILARITY)).all():
            raise UserError(
                f"GLUE stsb: labels are from {labels.min():g} to {labels.max():g}, expected 0 to {MAX_SIMILARITY}; "
                "if all are -1, they are the test set's, which are kept back: score the validation set"
            )
        return {"pearson": Correlation(said, labels), "spearman": Correlation(said, labels, of_ranks=True)}
    for what, values in (("predictions", said), ("labels", labels)):
        check_classes(f"GLUE {task}", what, values, CLASSES[task])
    if task == "cola":
        return {"matthews": Correlation(said, labels)}
    figures: dict[str, Metric] = {"accuracy": MeanMetric((said == labels).astype(np.float64))}
    if task in ("mrpc", "qqp"):
        figures["f1"] = MeanMetric(2.0 * (said * labels), (said + labels).astype(np.float64))
    return figures
