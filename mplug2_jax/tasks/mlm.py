"""Masked language modeling by the text encoder and the universal layers, without frames."""

from collections import Counter
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from data_pipelines.examples import Example
from mplug2_jax.metrics.metric import MeanMetric
from mplug2_jax.model.mplug2 import Mplug2
from mplug2_jax.objectives.forward import DeviceBatch, ForwardPass, LossOutput
from mplug2_jax.objectives.mlm import mlm_loss, predict_masked
from mplug2_jax.tasks.base import Decode, EvalOutput, HostPredictions, Predictions, Task, TaskContext
from mplug2_jax.tasks.specs import TASK_SPECS


def loss(forward: ForwardPass, context: TaskContext) -> LossOutput:
    """Compute the cross entropy of the masked tokens."""
    return mlm_loss(forward, context.tokens, context.config.mlm, context.config.label_smoothing)


def predict(model: Mplug2, batch: DeviceBatch, context: TaskContext) -> Predictions:
    """Return the text with the best guess for each masked token, and which tokens were masked."""
    log_probs, masked = predict_masked(ForwardPass(model, batch), context.tokens, context.config.mlm)
    return {"ids": jnp.where(masked > 0, jnp.argmax(log_probs, -1), batch["text"]), "masked": masked > 0}


def score(predictions: HostPredictions, examples: Sequence[Example], decode: Decode) -> EvalOutput:
    """Score the fraction of masked tokens that are correct; the baseline is always the most frequent masked token.

    The example score is the fraction in that text; for texts without masked tokens, the overall fraction.
    """
    masked = predictions["masked"]
    targets = [example.arrays["text"][mask] for example, mask in zip(examples, masked, strict=True)]
    hits = [(ids[mask] == ref).sum() for ids, mask, ref in zip(predictions["ids"], masked, targets, strict=True)]
    num_masked = masked.sum(1).astype(np.float64)
    accuracy = MeanMetric(np.asarray(hits, np.float64), num_masked)
    fractions = np.full(len(hits), accuracy.value)
    np.divide(hits, num_masked, out=fractions, where=num_masked > 0)
    counts = Counter(int(token) for row in targets for token in row)
    return EvalOutput(
        metrics={"accuracy": accuracy},
        baselines={"accuracy": max(counts.values(), default=0) / max(int(masked.sum()), 1)},
        predictions=[decode(ids.tolist()) for ids in predictions["ids"]],
        example_scores=fractions,
    )


TASK = Task(**vars(TASK_SPECS["mlm"]), loss=loss, predict=predict, score=score)
