"""Visual grounding by generation: a phrase in, the cells of its box's corners out."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.examples import Example, box_of_words
from mplug2_jax.metrics.grounding import box_accuracy, box_iou, mean_iou
from mplug2_jax.tasks import answer
from mplug2_jax.tasks.base import EvalOutput, HostPredictions
from mplug2_jax.tasks.contracts import CONTRACTS

NO_BOX = (np.nan,) * 4


def score(
    predictions: HostPredictions, examples: Sequence[Example], decode: Callable[[Sequence[int]], str]
) -> EvalOutput:
    """Accuracy at an overlap of one half, and the mean overlap, beside always saying the mean box."""
    said = [decode(row.tolist()) for row in predictions["ids"]]
    true = np.stack([example.arrays["box"] for example in examples])
    found = box_iou(np.asarray([box_of_words(words) or NO_BOX for words in said]), true)
    constant = box_iou(np.broadcast_to(true.mean(0), true.shape), true)
    figures = {"accuracy_at_0.5": box_accuracy(found), "mean_iou": mean_iou(found)}
    baselines = {"accuracy_at_0.5": box_accuracy(constant).value, "mean_iou": mean_iou(constant).value}
    return EvalOutput(metrics=figures, baselines=baselines, predictions=said, example_scores=found)


TASK = dataclasses.replace(answer.TASK, **vars(CONTRACTS["ground"]), score=score)
