"""Captioning: the picture alone as in the release, or asked for by an instruction where the batch brings one."""

import dataclasses
from collections.abc import Callable, Sequence
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
from mplug2_jax.tasks.base import EvalOutput, HostPredictions, Predictions, Task, TaskContext
from mplug2_jax.tasks.contracts import CONTRACTS

_PATIENCE = 800.0  # seconds for each Java program: a run that hears nothing for half an hour ends


def loss(forward: ForwardPass, context: TaskContext) -> LossOutput:
    """Cross entropy of the caption's tokens."""
    return caption_loss(forward, context.settings.label_smoothing)


def predict(model: Mplug2, batch: DeviceBatch, context: TaskContext) -> Predictions:
    """The best caption's ids."""
    memory, mask = ForwardPass(model, batch).caption_memory
    search, seeds = context.settings.search, batch.get("example_id")
    found = generate(model.decoder, memory, mask, search, context.tokens, seeds)
    kept = jnp.arange(found.ids.shape[-1]) < found.lengths[:, :1]
    return {"ids": jnp.where(kept, found.ids[:, 0], context.tokens.pad)}


def score(
    predictions: HostPredictions, examples: Sequence[Example], decode: Callable[[Sequence[int]], str]
) -> EvalOutput:
    """CIDEr, BLEU and ROUGE-L against all captions of a picture, beside the captions of another picture.

    How good a caption is, is its CIDEr.
    """
    said = [decode(row.tolist()) for row in predictions["ids"]]
    references, shifted = _references(examples)  # once, for both
    figures = caption_scores(tokenize_captions(said), references, tokenize=False)
    baselines = caption_scores(shifted, references, tokenize=False)
    cider = figures["cider"]
    assert isinstance(cider, MeanMetric)
    return EvalOutput(
        figures, {name: figure.value for name, figure in baselines.items()}, said, example_scores=cider.values
    )


def external_metrics(scored: EvalOutput, examples: Sequence[Example]) -> EvalOutput:
    """METEOR and SPICE besides; those that the first process has no program for are absent, in all processes."""
    references, shifted = _references(examples)
    both = [*tokenize_captions(scored.predictions), *shifted], [*references, *references]  # a program is started once
    mine: dict[str, list[Any] | None] = {}
    if is_primary_process():
        counts, graphs = meteor(*both, timeout=_PATIENCE), spice(*both, timeout=_PATIENCE)
        mine["meteor"] = None if counts is None else counts.counts.tolist()
        mine["spice"] = None if graphs is None else graphs.values.tolist()
    found = {name: None if rows is None else np.asarray(rows) for name, rows in allgather_objects(mine)[0].items()}
    figures, baselines = dict(scored.metrics), dict(scored.baselines)
    for name, figure in (("meteor", Meteor), ("spice", MeanMetric)):
        if (rows := found[name]) is not None:
            figures[name], baselines[name] = figure(rows[: len(examples)]), figure(rows[len(examples) :]).value
    absent = tuple(name for name in found if found[name] is None)
    return dataclasses.replace(scored, metrics=figures, baselines=baselines, absent=absent)


def _references(examples: Sequence[Example]) -> tuple[list[list[str]], list[str]]:
    """Each example's captions as tokens, and a caption of the next."""
    references = [tokenize_captions(example.answers) for example in examples]
    return references, [answers[0] for answers in (*references[1:], references[0])]


TASK = Task(
    **vars(CONTRACTS["caption"]),
    loss=loss,
    predict=predict,
    score=score,
    external_metrics=external_metrics,
)
