"""Vision-language contrast, and retrieval by it: texts for pictures and pictures for texts."""

from collections.abc import Callable, Mapping, Sequence
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
from mplug2_jax.tasks.base import EvalOutput, HostPredictions, Predictions, RetrievalNeighbors, Task, TaskContext
from mplug2_jax.tasks.contracts import CONTRACTS

CUTOFFS = (1, 5, 10)
NUM_NEIGHBORS = 5  # of each example, to look at


def loss(forward: ForwardPass, context: TaskContext) -> LossOutput:
    """Symmetric contrast over the global batch."""
    return vlc_loss(forward, context.settings.vlc)


def predict(model: Mplug2, batch: DeviceBatch, context: TaskContext) -> Predictions:
    """Unit vectors of pictures and texts."""
    del context
    visual, text = ForwardPass(model, batch).features
    return {"visual": visual, "text": text}


class RetrievalIndex(NamedTuple):
    """What retrieval is between: texts by their ids, and pictures by theirs, each once.

    ``first`` is a picture's first example, ``of_text`` the picture of each example.
    """

    texts: Int[np.ndarray, " n"]
    pictures: Int[np.ndarray, " p"]
    first: Int[np.ndarray, " p"]
    of_text: Int[np.ndarray, " n"]

    def directions(self) -> tuple[tuple[str, Int[np.ndarray, " q"], Int[np.ndarray, " c"]], ...]:
        """Both directions: name, queries' ids, candidates' ids."""
        return ("text_to_visual", self.texts, self.pictures), ("visual_to_text", self.pictures, self.texts)


def build_index(examples: Sequence[Example]) -> RetrievalIndex:
    """Examples of one picture are its several texts."""
    texts = np.asarray([int(example.arrays["example_id"]) for example in examples])
    return RetrievalIndex(texts, *np.unique(texts, return_index=True, return_inverse=True))


def search_both_directions(predictions: HostPredictions, sides: RetrievalIndex, k: int) -> dict[str, TopKResult]:
    """Ranks and the k nearest by contrast, by direction."""
    vectors = {"text_to_visual": (predictions["text"], predictions["visual"][sides.first])}
    vectors["visual_to_text"] = vectors["text_to_visual"][::-1]
    return {name: exact_top_k(*vectors[name], own, others, k) for name, own, others in sides.directions()}


def retrieval_metrics(
    ranks: Mapping[str, Int[np.ndarray, " q"]], sides: RetrievalIndex, prefix: str = ""
) -> tuple[dict[str, Metric], dict[str, float]]:
    """Recall at 1, 5, 10 and median rank by direction, and the same by chance."""
    figures: dict[str, Metric] = {}
    baselines: dict[str, float] = {}
    for direction, queries, candidates in sides.directions():
        for k in CUTOFFS:
            figures[f"{prefix}{direction}_r{k}"] = recall_at(ranks[direction], k)
            baselines[f"{prefix}{direction}_r{k}"] = chance_recall(queries, candidates, k)
        figures[f"{prefix}{direction}_median_rank"] = median_rank(ranks[direction])
        baselines[f"{prefix}{direction}_median_rank"] = chance_median_rank(queries, candidates)
    return figures, baselines


def collect_neighbors(
    pictures: Int[np.ndarray, "n j"], texts: Int[np.ndarray, "p k"], sides: RetrievalIndex
) -> RetrievalNeighbors:
    """What was found for each example, from each text's nearest pictures and each picture's nearest texts."""
    return RetrievalNeighbors(texts[sides.of_text], sides.first[pictures], sides.first[sides.of_text])


def score(
    predictions: HostPredictions, examples: Sequence[Example], decode: Callable[[Sequence[int]], str]
) -> EvalOutput:
    """Recall at 1, 5, 10 and median rank, both ways, beside chance.

    What is said is the text that is nearest to the picture; how good that is, is minus the best right text's rank.
    """
    del decode
    sides = build_index(examples)
    found = search_both_directions(predictions, sides, NUM_NEIGHBORS)
    ranks = {direction: each.ranks for direction, each in found.items()}
    nearest = collect_neighbors(found["text_to_visual"].nearest, found["visual_to_text"].nearest, sides)
    return EvalOutput(
        *retrieval_metrics(ranks, sides),
        predictions=[examples[i].text for i in nearest.texts[:, 0]],
        example_scores=-1.0 - ranks["visual_to_text"][sides.of_text],
        nearest=nearest,
    )


TASK = Task(
    **vars(CONTRACTS["vlc"]),
    loss=loss,
    predict=predict,
    score=score,
)
