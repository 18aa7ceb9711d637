"""Captioning: from the frames alone as in the release, or by an instruction where the batch has one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from data_pipelines.examples import Example
from mplug2_jax.generation.decode import generate
from mplug2_jax.metrics.caption import caption_scores, tokenize_captions
from mplug2_jax.metrics.java_metrics import Meteor, meteor, spice
from mplug2_jax.metrics.metric import MeanMetric
from mplug2_jax.model.mplug2 import Mplug2
from mplug2_jax.objectives.forward import DeviceBatch, ForwardPass, LossOutput
from mplug2_jax.objectives.language import caption_loss
from mplug2_jax.parallel.processes import allgather_objects, is_primary_process
from mplug2_jax.tasks.base import Decode, EvalOutput, HostPredictions, Predictions, Task, TaskContext
from mplug2_jax.tasks.specs import TASK_SPECS

_JAVA_TIMEOUT = 800.0  # seconds for each Java program; a run without progress for half an hour is ended


def loss(forward: ForwardPass, context: TaskContext) -> LossOutput:
    """Compute the cross entropy of the caption's tokens."""
    return caption_loss(forward, context.config.label_smoothing)


def predict(model: Mplug2, batch: DeviceBatch, context: TaskContext) -> Predictions:
    """Return the ids of the best captions."""
    memory, mask = ForwardPass(model, batch).caption_memory
    output = generate(model.decoder, memory, mask, context.config.search, context.tokens, batch.get("example_id"))
    generated = jnp.arange(output.ids.shape[-1]) < output.lengths[:, :1]
    return {"ids": jnp.where(generated, output.ids[:, 0], context.tokens.pad)}


def score(predictions: HostPredictions, examples: Sequence[Example], decode: Decode) -> EvalOutput:
    """Score CIDEr, BLEU and ROUGE-L against all references; the baseline is another example's caption.

    A caption's example score is its CIDEr.
    """
    captions = [decode(ids.tolist()) for ids in predictions["ids"]]
    references, shifted = _tokenize_references(examples)
    metrics = caption_scores(tokenize_captions(captions), references)
    baselines = caption_scores(shifted, references)
    cider = metrics["cider"]
    assert isinstance(cider, MeanMetric)
    return EvalOutput(metrics, {name: metric.value for name, metric in baselines.items()}, captions, cider.values)


def external_metrics(output: EvalOutput, examples: Sequence[Example]) -> EvalOutput:
    """Add METEOR and SPICE; in all processes, a metric is absent if the primary process cannot compute it."""
    references, shifted = _tokenize_references(examples)
    # Predictions and baselines go to one call, so that each program starts once.
    inputs = [*tokenize_captions(output.predictions), *shifted], [*references, *references]
    local: dict[str, list[Any] | None] = {}
    if is_primary_process():
        meteor_counts, spice_scores = meteor(*inputs, timeout=_JAVA_TIMEOUT), spice(*inputs, timeout=_JAVA_TIMEOUT)
        local["meteor"] = None if meteor_counts is None else meteor_counts.counts.tolist()
        local["spice"] = None if spice_scores is None else spice_scores.values.tolist()
    values = {name: None if rows is None else np.asarray(rows) for name, rows in allgather_objects(local)[0].items()}
    metrics, baselines = dict(output.metrics), dict(output.baselines)
    for name, metric in (("meteor", Meteor), ("spice", MeanMetric)):
        if (rows := values[name]) is not None:
            metrics[name], baselines[name] = metric(rows[: len(examples)]), metric(rows[len(examples) :]).value
    unavailable = tuple(name for name in values if values[name] is None)
    return dataclasses.replace(output, metrics=metrics, baselines=baselines, unavailable_metrics=unavailable)


def _tokenize_references(examples: Sequence[Example]) -> tuple[list[list[str]], list[str]]:
    """Return each example's tokenized captions, and one caption of the next example."""
    references = [tokenize_captions(example.answers) for example in examples]
    return references, [captions[0] for captions in (*references[1:], references[0])]


TASK = Task(**vars(TASK_SPECS["caption"]), loss=loss, predict=predict, score=score, external_metrics=external_metrics)
