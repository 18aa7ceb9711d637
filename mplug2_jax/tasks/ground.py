"""Visual grounding by generation: a phrase in, the quantized corners of its box out."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.examples import Example, parse_box
from mplug2_jax.metrics.grounding import box_accuracy, box_iou, mean_iou
from mplug2_jax.tasks import answer
from mplug2_jax.tasks.base import Decode, EvalOutput, HostPredictions
from mplug2_jax.tasks.specs import TASK_SPECS

NO_BOX = (np.nan,) * 4


def score(predictions: HostPredictions, examples: Sequence[Example], decode: Decode) -> EvalOutput:
    """Score accuracy at IoU 0.5 and mean IoU; the baseline is always the mean box. The example score is the IoU."""
    texts = [decode(ids.tolist()) for ids in predictions["ids"]]
    boxes = np.stack([example.arrays["box"] for example in examples])
    iou = box_iou(np.asarray([parse_box(text) or NO_BOX for text in texts]), boxes)
    constant = box_iou(np.broadcast_to(boxes.mean(0), boxes.shape), boxes)
    metrics = {"accuracy_at_0.5": box_accuracy(iou), "mean_iou": mean_iou(iou)}
    baselines = {"accuracy_at_0.5": box_accuracy(constant).value, "mean_iou": mean_iou(constant).value}
    return EvalOutput(metrics, baselines, texts, example_scores=iou)


TASK = dataclasses.replace(answer.TASK, **vars(TASK_SPECS["ground"]), score=score)
