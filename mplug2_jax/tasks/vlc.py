"""Vision-language contrast, and retrieval by it: texts for pictures and pictures for texts."""

from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.examples import Example
from mplug2_jax.evaluation.metrics.ratio import Figure
from mplug2_jax.evaluation.metrics.retrieval import chance_at, median_by_chance, median_rank, ranks_of, recall_at
from mplug2_jax.model.mplug2 import Mplug2
from mplug2_jax.objectives.forward import DeviceBatch, Forward, Outcome
from mplug2_jax.objectives.vlc import vlc_loss
from mplug2_jax.tasks.base import HostPredictions, Predictions, Scored, Task, TaskContext

CUTOFFS = (1, 5, 10)


def loss(forward: Forward, context: TaskContext) -> Outcome:
    """Symmetric contrast over the global batch."""
    return vlc_loss(forward, context.settings.vlc)


def predict(model: Mplug2, batch: DeviceBatch, context: TaskContext) -> Predictions:
    """Unit vectors of pictures and texts."""
    del context
    visual, text = Forward(model, batch).features
    return {"visual": visual, "text": text}


def score(predictions: HostPredictions, examples: Sequence[Example], decode: Callable[[Sequence[int]], str]) -> Scored:
    """Recall at 1, 5, 10 and median rank, both ways, beside chance. Examples of one picture are its several texts."""
    del decode
    texts = np.asarray([int(example.arrays["example_id"]) for example in examples])
    pictures, first, of_text = np.unique(texts, return_index=True, return_inverse=True)
    similarity = predictions["text"] @ predictions["visual"][first].T
    figures: dict[str, Figure] = {}
    baselines: dict[str, float] = {}
    for direction, matrix, queries, candidates in (
        ("text_to_visual", similarity, texts, pictures), ("visual_to_text", similarity.T, pictures, texts)
    ):  # fmt: skip
        ranks = ranks_of(matrix, queries, candidates)
        for k in CUTOFFS:
            figures[f"{direction}_r{k}"] = recall_at(ranks, k)
            baselines[f"{direction}_r{k}"] = chance_at(queries, candidates, k)
        figures[f"{direction}_median_rank"] = median_rank(ranks)
        baselines[f"{direction}_median_rank"] = median_by_chance(queries, candidates)
    nearest = similarity.argmax(0)[of_text]
    return Scored(figures, baselines, said=[examples[i].text for i in nearest])


TASK = Task(
    name="vlc",
    parts=("vision", "text", "universal", "contrastive"),
    keys=("frames", "text", "text_mask", "example_id"),
    loss=loss,
    predict=predict,
    score=score,
)
