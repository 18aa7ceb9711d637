"""Classification by a head: the class of an image or video, or of a text."""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from data_pipelines.examples import Example
from mplug2_jax.metrics.classification import confusion_summary, top_k_accuracy
from mplug2_jax.model.mplug2 import Mplug2
from mplug2_jax.objectives.classification import class_loss
from mplug2_jax.objectives.forward import DeviceBatch, ForwardPass, LossOutput
from mplug2_jax.tasks.base import Decode, EvalOutput, HostPredictions, Predictions, Task, TaskContext
from mplug2_jax.tasks.specs import TASK_SPECS


def loss(forward: ForwardPass, context: TaskContext) -> LossOutput:
    """Compute the cross entropy of the class."""
    return class_loss(forward, context.config.label_smoothing)


def predict(model: Mplug2, batch: DeviceBatch, context: TaskContext) -> Predictions:
    """Return the probability of each class."""
    del context
    return {"probabilities": jax.nn.softmax(ForwardPass(model, batch).class_logits, axis=-1)}


def score(predictions: HostPredictions, examples: Sequence[Example], decode: Decode) -> EvalOutput:
    """Score top-1 and, with more than five classes, top-5 accuracy; the baseline is always the most frequent classes.

    The example score is the probability of the correct class.
    """
    del decode
    probabilities = predictions["probabilities"]
    labels = np.asarray([int(example.arrays["label"]) for example in examples])
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    names = {f"top_{k}": k for k in (1, 5) if k == 1 or probabilities.shape[1] > k}
    predicted = probabilities.argmax(1)
    return EvalOutput(
        metrics={name: top_k_accuracy(probabilities, labels, k) for name, k in names.items()},
        baselines={name: float(np.sort(counts)[::-1][:k].sum() / len(labels)) for name, k in names.items()},
        predictions=class_names(predicted, examples),
        example_scores=label_probability(probabilities, labels),
        confusion=confusion_summary(predicted, labels, class_names(np.arange(probabilities.shape[1]), examples)),
    )


def label_probability(
    probabilities: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Return the probability of each example's label; 0 for NaN."""
    return np.nan_to_num(np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0])


def class_names(classes: Int[np.ndarray, " n"], examples: Sequence[Example]) -> list[str]:
    """Return the names of classes, as the examples name them; classes without examples are numbered."""
    names = {int(example.arrays["label"]): example.answers[0] for example in examples}
    return [names.get(number, f"class {number}") for number in classes.tolist()]


TASK = Task(**vars(TASK_SPECS["classify"]), averages_views=True, loss=loss, predict=predict, score=score)
