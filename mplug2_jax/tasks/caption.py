"""Captioning: the picture alone as in the release, or asked for by an instruction where the batch brings one."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp

from data_pipelines.examples import Example
from mplug2_jax.evaluation.metrics.caption import caption_scores, tokens
from mplug2_jax.evaluation.metrics.ratio import Ratio
from mplug2_jax.generation.decode import generate
from mplug2_jax.model.mplug2 import Mplug2
from mplug2_jax.objectives.forward import DeviceBatch, Forward, Outcome
from mplug2_jax.objectives.language import caption_loss
from mplug2_jax.tasks.base import HostPredictions, Predictions, Scored, Task, TaskContext


def loss(forward: Forward, context: TaskContext) -> Outcome:
    """Cross entropy of the caption's tokens."""
    return caption_loss(forward, context.settings.label_smoothing)


def predict(model: Mplug2, batch: DeviceBatch, context: TaskContext) -> Predictions:
    """The best caption's ids."""
    memory, mask = Forward(model, batch).described
    search, seeds = context.settings.search, batch.get("example_id")
    found = generate(model.decoder, memory, mask, search, context.tokens, seeds)
    kept = jnp.arange(found.ids.shape[-1]) < found.lengths[:, :1]
    return {"ids": jnp.where(kept, found.ids[:, 0], context.tokens.pad)}


def score(predictions: HostPredictions, examples: Sequence[Example], decode: Callable[[Sequence[int]], str]) -> Scored:
    """CIDEr, BLEU and ROUGE-L against all captions of a picture, beside the captions of another picture.

    How good a caption is, is its CIDEr.
    """
    said = [decode(row.tolist()) for row in predictions["ids"]]
    references = [tokens(example.answers) for example in examples]  # once, for both
    shifted = [answers[0] for answers in (*references[1:], references[0])]
    figures = caption_scores(tokens(said), references, tokenise=False)
    baselines = caption_scores(shifted, references, tokenise=False)
    cider = figures["cider"]
    assert isinstance(cider, Ratio)
    return Scored(figures, {name: figure.value for name, figure in baselines.items()}, said, goodness=cider.values)


TASK = Task(
    name="caption",
    parts=("vision", "universal", "decoder"),
    further_parts=("text", "fusion"),
    keys=("frames", "target", "target_weights"),
    loss=loss,
    predict=predict,
    score=score,
)
