"""Vision-language contrast, and retrieval by it: texts for pictures and pictures for texts."""

from collections.abc import Callable, Sequence

from data_pipelines.examples import Example
from mplug2_jax.evaluation.metrics.ratio import Ratio
from mplug2_jax.evaluation.metrics.retrieval import recall_at
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
    """Recall at 1, 5, 10 in both directions, beside chance."""
    del decode
    similarity = predictions["text"] @ predictions["visual"].T
    figures: dict[str, Ratio] = {}
    baselines: dict[str, float] = {}
    for direction, matrix in (("text_to_visual", similarity), ("visual_to_text", similarity.T)):
        for k in CUTOFFS:
            figures[f"{direction}_r{k}"] = recall_at(matrix, k)
            baselines[f"{direction}_r{k}"] = min(1.0, k / len(examples))
    best = similarity.argmax(0)
    return Scored(figures, baselines, said=[examples[i].text for i in best])


TASK = Task(
    name="vlc",
    parts=("vision", "text", "universal", "contrastive"),
    keys=("frames", "text", "text_mask", "example_id"),
    loss=loss,
    predict=predict,
    score=score,
)
