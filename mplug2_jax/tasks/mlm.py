"""Masked-language modelling: text encoder and universal layers, no picture."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from data_pipelines.examples import Example
from mplug2_jax.metrics.metric import MeanMetric
from mplug2_jax.model.mplug2 import Mplug2
from mplug2_jax.objectives.forward import DeviceBatch, ForwardPass, LossOutput
from mplug2_jax.objectives.mlm import mlm_loss, predict_masked
from mplug2_jax.tasks.base import EvalOutput, HostPredictions, Predictions, Task, TaskContext
from mplug2_jax.tasks.contracts import CONTRACTS


def loss(forward: ForwardPass, context: TaskContext) -> LossOutput:
    """Cross entropy of the masked tokens."""
    return mlm_loss(forward, context.tokens, context.settings.mlm, context.settings.label_smoothing)


def predict(model: Mplug2, batch: DeviceBatch, context: TaskContext) -> Predictions:
    """Each token's best guess, and which tokens were masked."""
    log_probs, chosen = predict_masked(ForwardPass(model, batch), context.tokens, context.settings.mlm)
    return {"ids": jnp.where(chosen > 0, jnp.argmax(log_probs, -1), batch["text"]), "chosen": chosen > 0}


def score(
    predictions: HostPredictions, examples: Sequence[Example], decode: Callable[[Sequence[int]], str]
) -> EvalOutput:
    """Share of masked tokens that were guessed, beside always guessing the most frequent masked token.

    How good a text is, is its own share; of one without masked tokens, that of all.
    """
    chosen = predictions["chosen"]
    true = [example.arrays["text"][mask] for example, mask in zip(examples, chosen, strict=True)]
    hits = [(ids[mask] == t).sum() for ids, mask, t in zip(predictions["ids"], chosen, true, strict=True)]
    masked = chosen.sum(1).astype(np.float64)
    accuracy = MeanMetric(np.asarray(hits, np.float64), masked)
    shares = np.full(len(hits), accuracy.value)
    np.divide(hits, masked, out=shares, where=masked > 0)
    counts: dict[int, int] = {}
    for token in (int(t) for row in true for t in row):
        counts[token] = counts.get(token, 0) + 1
    return EvalOutput(
        metrics={"accuracy": accuracy},
        baselines={"accuracy": max(counts.values(), default=0) / max(int(chosen.sum()), 1)},
        predictions=[decode(row.tolist()) for row in predictions["ids"]],
        example_scores=shares,
    )


TASK = Task(
    **vars(CONTRACTS["mlm"]),
    loss=loss,
    predict=predict,
    score=score,
)
