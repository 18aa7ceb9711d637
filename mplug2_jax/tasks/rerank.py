"""Retrieval in two steps: contrast finds each query's nearest candidates, matching on fused tokens orders them anew."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from data_pipelines.examples import Example
from mplug2_jax.metrics.retrieval import compute_ranks
from mplug2_jax.model.mplug2 import Mplug2
from mplug2_jax.objectives.forward import DeviceBatch
from mplug2_jax.tasks import vlc, vlm
from mplug2_jax.tasks.base import EvalOutput, HostPredictions, ScorePairs, TaskContext
from mplug2_jax.tasks.contracts import CONTRACTS
from mplug2_jax.tasks.vlc import (
    NUM_NEIGHBORS,
    build_index,
    collect_neighbors,
    retrieval_metrics,
    search_both_directions,
)


def score_pairs(model: Mplug2, batch: DeviceBatch, context: TaskContext) -> Float[Array, "b r"]:
    """How sure the matching head is of each text: logits of yes less those of no.

    That is the order of v1's score, the probability of yes, which in float32 is 1 for all that are sure. Similarities
    are not added: they have chosen the candidates, and v1 adds none.
    """
    del context
    visual = model.encode_visual(batch["frames"])
    text, mask = (batch[name].reshape(-1, batch[name].shape[-1]) for name in ("text", "text_mask"))
    _, fused = model.fusion(model.encode_text(text, mask), mask, visual)
    logits = model.matching(fused)
    return jnp.reshape(logits[:, 1] - logits[:, 0], batch["text"].shape[:2])


def rerank(
    predictions: HostPredictions, examples: Sequence[Example], context: TaskContext, score: ScorePairs
) -> HostPredictions:
    """Ranks by contrast (``DIRECTION``) and by matching (``reranked_DIRECTION``), and the ``nearest_DIRECTION`` by it.

    The ``config.tasks.rerank_k`` nearest candidates of every query, both ways, are matched, each pair once: at most
    2 k pairs for each example. A query whose right candidates are not among them keeps its rank.
    """
    sides = build_index(examples)
    found = search_both_directions(predictions, sides, context.settings.rerank_k)
    numbers = {
        direction: _pair_numbers(direction, each.nearest, len(sides.pictures)) for direction, each in found.items()
    }
    every = np.unique(np.concatenate([each.ravel() for each in numbers.values()]))
    text, picture = np.divmod(every, len(sides.pictures))
    scores = match(np.stack([text, sides.first[picture]], axis=1))
    refined: dict[str, np.ndarray] = {}
    for direction, queries, candidates in sides.directions():
        ranks, nearest = found[direction]
        anew = scores[np.searchsorted(every, numbers[direction])]
        right = (candidates[nearest] == queries[:, None]).any(1)
        refined[direction] = ranks
        refined[f"reranked_{direction}"] = np.where(right, compute_ranks(anew, queries, candidates[nearest]), ranks)
        order = np.argsort(np.where(np.isnan(anew), np.inf, -anew), axis=1, kind="stable")[:, :NUM_NEIGHBORS]
        refined[f"nearest_{direction}"] = np.take_along_axis(nearest, order, axis=1)
    return refined


def _pair_numbers(direction: str, nearest: Int[np.ndarray, "q k"], pictures: int) -> Int[np.ndarray, "q k"]:
    """One number for each pair of a text and a picture."""
    queries = np.arange(len(nearest))[:, None]
    return queries * pictures + nearest if direction == "text_to_visual" else nearest * pictures + queries


def score(
    predictions: HostPredictions, examples: Sequence[Example], decode: Callable[[Sequence[int]], str]
) -> EvalOutput:
    """Recall and median rank by contrast alone, and again after matching, beside chance.

    What is said is the text that matches best; how good that is, is minus the best right text's rank after matching.
    """
    del decode
    sides = build_index(examples)
    figures, baselines = retrieval_metrics(predictions, sides)
    reranked = {direction: predictions[f"reranked_{direction}"] for direction, *_ in sides.directions()}
    after, by_chance = retrieval_metrics(reranked, sides, "reranked_")
    nearest = collect_neighbors(predictions["nearest_text_to_visual"], predictions["nearest_visual_to_text"], sides)
    return EvalOutput(
        metrics={**figures, **after},
        baselines={**baselines, **by_chance},
        predictions=[examples[i].text for i in nearest.texts[:, 0]],
        example_scores=-1.0 - reranked["visual_to_text"][sides.of_text],
        nearest=nearest,
    )


TASK = dataclasses.replace(
    vlm.TASK, **vars(CONTRACTS["rerank"]), predict=vlc.predict, score_pairs=score_pairs, rerank=rerank, score=score
)
