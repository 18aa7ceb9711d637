"""GLUE by a classification head: each task with its own metrics, from one text or a pair of texts."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.examples import Example
from mplug2_jax.metrics.classification import confusion_summary
from mplug2_jax.metrics.glue import MAX_SIMILARITY, NUM_CLASSES, glue_metrics
from mplug2_jax.tasks import classify
from mplug2_jax.tasks.base import Decode, EvalOutput, HostPredictions, Task
from mplug2_jax.tasks.specs import GLUE, SIMILARITY_LEVELS, TASK_SPECS


def score(name: str, predictions: HostPredictions, examples: Sequence[Example], decode: Decode) -> EvalOutput:
    """Score a task's metrics; the baseline is always the most frequent class, or STS-B's mean label.

    The example score is the probability of the correct class; for STS-B, the negated absolute error.
    """
    del decode
    confusion = None
    probabilities = predictions["probabilities"].astype(np.float64)
    if name == "stsb":
        labels = np.asarray([float(example.answers[0]) for example in examples])
        predicted = probabilities @ np.asarray(SIMILARITY_LEVELS, np.float64)
        constant = np.full_like(labels, labels.mean())
        texts = [f"{number:.1f}" for number in predicted]
        scores = np.nan_to_num(-np.abs(predicted - labels), nan=-MAX_SIMILARITY)
    else:
        labels = np.asarray([int(example.arrays["label"]) for example in examples])
        predicted = probabilities.argmax(1)
        constant = np.full_like(labels, Counter(labels.tolist()).most_common(1)[0][0])
        texts = classify.class_names(predicted, examples)
        scores = classify.label_probability(probabilities, labels)
        classes = classify.class_names(np.arange(NUM_CLASSES[name]), examples)
        confusion = confusion_summary(predicted, labels, classes)
    baselines = {metric: result.value for metric, result in glue_metrics(name, constant, labels).items()}
    return EvalOutput(glue_metrics(name, predicted, labels), baselines, texts, scores, confusion)


def _task(name: str) -> Task:
    return dataclasses.replace(
        classify.TASK,
        **vars(TASK_SPECS[name]),
        num_classes=NUM_CLASSES.get(name, len(SIMILARITY_LEVELS)),
        score=functools.partial(score, name),
    )


TASKS: Mapping[str, Task] = {name: _task(name) for name in GLUE}
