"""Vision-language contrast, and retrieval by it: text to visual and visual to text."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from data_pipelines.examples import Example
from mplug2_jax.metrics.exact_topk import TopKResult, exact_top_k
from mplug2_jax.metrics.metric import Metric
from mplug2_jax.metrics.retrieval import chance_median_rank, chance_recall, median_rank, recall_at
from mplug2_jax.model.mplug2 import Mplug2
from mplug2_jax.objectives.forward import DeviceBatch, ForwardPass, LossOutput
from mplug2_jax.objectives.vlc import vlc_loss
from mplug2_jax.tasks.base import (
    Decode,
    EvalOutput,
    HostPredictions,
    Predictions,
    RetrievalNeighbors,
    Task,
    TaskContext,
)
from mplug2_jax.tasks.specs import TASK_SPECS

RECALL_CUTOFFS = (1, 5, 10)
NUM_NEIGHBORS = 5  # kept of each example


def loss(forward: ForwardPass, context: TaskContext) -> LossOutput:
    """Compute the symmetric contrastive loss over the global batch."""
    return vlc_loss(forward, context.config.vlc)


def predict(model: Mplug2, batch: DeviceBatch, context: TaskContext) -> Predictions:
    """Return the unit vectors of frames and texts."""
    del context
    visual, text = ForwardPass(model, batch).features
    return {"visual": visual, "text": text}


class RetrievalIndex(NamedTuple):
    """The texts and the distinct visuals of a retrieval set; a text is correct for the visual of the same id."""

    text_ids: Int[np.ndarray, " n"]
    visual_ids: Int[np.ndarray, " v"]
    first_example: Int[np.ndarray, " v"]  # of each visual
    visual_of_text: Int[np.ndarray, " n"]

    def directions(self) -> tuple[tuple[str, Int[np.ndarray, " q"], Int[np.ndarray, " c"]], ...]:
        """Return both directions: name, ids of queries, ids of candidates."""
        return ("text_to_visual", self.text_ids, self.visual_ids), ("visual_to_text", self.visual_ids, self.text_ids)


def build_index(examples: Sequence[Example]) -> RetrievalIndex:
    """Index examples; those with the same id are several texts of one visual."""
    ids = np.asarray([int(example.arrays["example_id"]) for example in examples])
    return RetrievalIndex(ids, *np.unique(ids, return_index=True, return_inverse=True))


def search_both_directions(predictions: HostPredictions, index: RetrievalIndex, k: int) -> dict[str, TopKResult]:
    """Return ranks and the k nearest candidates by contrast, for each direction."""
    vectors = {"text_to_visual": (predictions["text"], predictions["visual"][index.first_example])}
    vectors["visual_to_text"] = vectors["text_to_visual"][::-1]
    return {
        name: exact_top_k(*vectors[name], queries, candidates, k) for name, queries, candidates in index.directions()
    }


def retrieval_metrics(
    ranks: Mapping[str, Int[np.ndarray, " q"]], index: RetrievalIndex, prefix: str = ""
) -> tuple[dict[str, Metric], dict[str, float]]:
    """Return recall at 1, 5, 10 and median rank for each direction, and their values by chance."""
    metrics: dict[str, Metric] = {}
    baselines: dict[str, float] = {}
    for direction, queries, candidates in index.directions():
        for k in RECALL_CUTOFFS:
            metrics[f"{prefix}{direction}_r{k}"] = recall_at(ranks[direction], k)
            baselines[f"{prefix}{direction}_r{k}"] = chance_recall(queries, candidates, k)
        metrics[f"{prefix}{direction}_median_rank"] = median_rank(ranks[direction])
        baselines[f"{prefix}{direction}_median_rank"] = chance_median_rank(queries, candidates)
    return metrics, baselines


def collect_neighbors(
    visuals: Int[np.ndarray, "n j"], texts: Int[np.ndarray, "v k"], index: RetrievalIndex
) -> RetrievalNeighbors:
    """Return each example's neighbors, from the nearest visuals of each text and the nearest texts of each visual."""
    first, visual_of_text = index.first_example, index.visual_of_text
    return RetrievalNeighbors(texts[visual_of_text], first[visuals], first[visual_of_text])


def score(predictions: HostPredictions, examples: Sequence[Example], decode: Decode) -> EvalOutput:
    """Score recall at 1, 5, 10 and median rank, both ways; the baseline is chance.

    The prediction is the text nearest to the visual, its score the negated rank of the best correct text.
    """
    del decode
    index = build_index(examples)
    results = search_both_directions(predictions, index, NUM_NEIGHBORS)
    ranks = {direction: result.ranks for direction, result in results.items()}
    nearest = collect_neighbors(results["text_to_visual"].nearest, results["visual_to_text"].nearest, index)
    return EvalOutput(
        *retrieval_metrics(ranks, index),
        predictions=[examples[i].text for i in nearest.texts[:, 0]],
        example_scores=-1.0 - ranks["visual_to_text"][index.visual_of_text],
        nearest=nearest,
    )


TASK = Task(**vars(TASK_SPECS["vlc"]), loss=loss, predict=predict, score=score)
