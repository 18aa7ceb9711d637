"""Two-stage retrieval: contrast finds the nearest candidates, and the matching head reranks them."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from data_pipelines.examples import Example
from mplug2_jax.metrics.retrieval import compute_ranks
from mplug2_jax.model.mplug2 import Mplug2
from mplug2_jax.objectives.forward import DeviceBatch
from mplug2_jax.tasks import vlc, vlm
from mplug2_jax.tasks.base import Decode, EvalOutput, HostPredictions, ScorePairs, TaskContext
from mplug2_jax.tasks.specs import TASK_SPECS


def score_pairs(model: Mplug2, batch: DeviceBatch, context: TaskContext) -> Float[Array, "b r"]:
    """Return the matching head's log odds of a match for each text.

    They have the order of v1's score, the probability of a match, which saturates at 1 in float32. Similarities are not
    added, as in v1: they have selected the candidates.
    """
    del context
    visual = model.encode_visual(batch["frames"])
    text, mask = (batch[name].reshape(-1, batch[name].shape[-1]) for name in ("text", "text_mask"))
    _, fused = model.fusion(model.encode_text(text, mask), mask, visual)
    logits = model.matching(fused)
    return jnp.reshape(logits[:, 1] - logits[:, 0], batch["text"].shape[:2])


def rerank(
    predictions: HostPredictions, examples: Sequence[Example], context: TaskContext, score_all: ScorePairs
) -> HostPredictions:
    """Return ranks by contrast (``DIRECTION``) and by matching (``reranked_DIRECTION``), and ``nearest_DIRECTION``.

    The ``config.tasks.rerank_k`` nearest candidates of every query, both ways, are matched, each pair once: at most
    2 k pairs per example. A query without a correct candidate among them keeps its rank.
    """
    index = vlc.build_index(examples)
    results = vlc.search_both_directions(predictions, index, context.config.rerank_k)
    num_visuals = len(index.visual_ids)
    pair_ids = {name: _pair_ids(name, result.nearest, num_visuals) for name, result in results.items()}
    unique_ids = np.unique(np.concatenate([ids.ravel() for ids in pair_ids.values()]))
    text, visual = np.divmod(unique_ids, num_visuals)
    scores = score_all(np.stack([text, index.first_example[visual]], axis=1))
    reranked: dict[str, np.ndarray] = {}
    for direction, queries, candidates in index.directions():
        ranks, nearest = results[direction]
        rerank_scores = scores[np.searchsorted(unique_ids, pair_ids[direction])]
        has_correct = (candidates[nearest] == queries[:, None]).any(1)
        new_ranks = compute_ranks(rerank_scores, queries, candidates[nearest])
        reranked[direction] = ranks
        reranked[f"reranked_{direction}"] = np.where(has_correct, new_ranks, ranks)
        order = np.argsort(np.where(np.isnan(rerank_scores), np.inf, -rerank_scores), axis=1, kind="stable")
        reranked[f"nearest_{direction}"] = np.take_along_axis(nearest, order[:, : vlc.NUM_NEIGHBORS], axis=1)
    return reranked


def _pair_ids(direction: str, nearest: Int[np.ndarray, "q k"], num_visuals: int) -> Int[np.ndarray, "q k"]:
    """Return one number for each pair of a text and a visual."""
    queries = np.arange(len(nearest))[:, None]
    return queries * num_visuals + nearest if direction == "text_to_visual" else nearest * num_visuals + queries


def score(predictions: HostPredictions, examples: Sequence[Example], decode: Decode) -> EvalOutput:
    """Score recall and median rank by contrast alone and after matching; the baseline is chance.

    The prediction is the text that matches best, its score the negated rank of the best correct text after matching.
    """
    del decode
    index = vlc.build_index(examples)
    metrics, baselines = vlc.retrieval_metrics(predictions, index)
    reranked = {direction: predictions[f"reranked_{direction}"] for direction, *_ in index.directions()}
    reranked_metrics, reranked_baselines = vlc.retrieval_metrics(reranked, index, "reranked_")
    nearest = vlc.collect_neighbors(predictions["nearest_text_to_visual"], predictions["nearest_visual_to_text"], index)
    return EvalOutput(
        metrics={**metrics, **reranked_metrics},
        baselines={**baselines, **reranked_baselines},
        predictions=[examples[i].text for i in nearest.texts[:, 0]],
        example_scores=-1.0 - reranked["visual_to_text"][index.visual_of_text],
        nearest=nearest,
    )


TASK = dataclasses.replace(
    vlm.TASK, **vars(TASK_SPECS["rerank"]), predict=vlc.predict, score_pairs=score_pairs, rerank=rerank, score=score
)
