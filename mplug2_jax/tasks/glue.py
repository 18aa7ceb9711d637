"""GLUE by a head: each task with its own scores, from the class of one text or two."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data_pipelines.examples import Example
from mplug2_jax.metrics.classification import confusion_summary
from mplug2_jax.metrics.glue import MAX_SIMILARITY, NUM_CLASSES, glue_metrics
from mplug2_jax.tasks import classify
from mplug2_jax.tasks.base import EvalOutput, HostPredictions, Task
from mplug2_jax.tasks.contracts import CONTRACTS, GLUE, SIMILARITY_LEVELS


def score(
    name: str, predictions: HostPredictions, examples: Sequence[Example], decode: Callable[[Sequence[int]], str]
) -> EvalOutput:
    """A task's figures, beside always saying the most frequent.

    How good a prediction is, is the right class's probability; of a number, minus how far it is off.
    """
    del decode
    confusion = None
    probabilities = predictions["probabilities"].astype(np.float64)
    if name == "stsb":
        true = np.asarray([float(example.answers[0]) for example in examples])
        said = probabilities @ np.asarray(SIMILARITY_LEVELS, np.float64)
        constant = np.full_like(true, true.mean())
        words = [f"{number:.1f}" for number in said]
        goodness = np.nan_to_num(-np.abs(said - true), nan=-MAX_SIMILARITY)
    else:
        true = np.asarray([int(example.arrays["label"]) for example in examples])
        said = probabilities.argmax(1)
        constant = np.full_like(true, Counter(true.tolist()).most_common(1)[0][0])
        words = classify.class_names(said, examples)
        goodness = classify.label_probability(probabilities, true)
        confusion = confusion_summary(said, true, classify.class_names(np.arange(NUM_CLASSES[name]), examples))
    baselines = {figure: found.value for figure, found in glue_metrics(name, constant, true).items()}
    return EvalOutput(glue_metrics(name, said, true), baselines, words, goodness, confusion)


def _task(name: str) -> Task:
    return dataclasses.replace(
        classify.TASK,
        **vars(CONTRACTS[name]),
        num_classes=NUM_CLASSES.get(name, len(SIMILARITY_LEVELS)),
        score=functools.partial(score, name),
    )


TASKS: Mapping[str, Task] = {name: _task(name) for name in GLUE}
