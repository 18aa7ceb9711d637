"""Question answering by generation: question and picture in, answer out."""

from collections import Counter
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from data_pipelines.examples import Example
from mplug2_jax.generation.decode import generate
from mplug2_jax.generation.rank import best_answer
from mplug2_jax.metrics.metric import MeanMetric
from mplug2_jax.model.mplug2 import Mplug2
from mplug2_jax.objectives.forward import DeviceBatch, ForwardPass, LossOutput
from mplug2_jax.objectives.language import answer_loss
from mplug2_jax.tasks.base import EvalOutput, HostPredictions, Predictions, Task, TaskContext
from mplug2_jax.tasks.contracts import CONTRACTS


def loss(forward: ForwardPass, context: TaskContext) -> LossOutput:
    """The release's loss: token sums per answer over the number of questions; with a teacher also distillation."""
    return answer_loss(forward, context.settings.distillation, context.settings.label_smoothing)


def predict(model: Mplug2, batch: DeviceBatch, context: TaskContext) -> Predictions:
    """The best answer's ids."""
    memory, mask = ForwardPass(model, batch).instruction_memory
    if context.answers is not None and context.num_ranked:
        best = best_answer(
            model.decoder, memory, mask, context.answers, context.tokens, num_candidates=context.num_ranked,
            double_count_first_token=context.double_count_first_token,
        )  # fmt: skip
        return {"ids": best}
    search, seeds = context.settings.search, batch.get("example_id")
    found = generate(model.decoder, memory, mask, search, context.tokens, seeds, context.answers)
    kept = jnp.arange(found.ids.shape[-1]) < found.lengths[:, :1]
    return {"ids": jnp.where(kept, found.ids[:, 0], context.tokens.pad)}


def score(
    predictions: HostPredictions, examples: Sequence[Example], decode: Callable[[Sequence[int]], str]
) -> EvalOutput:
    """Share of answers that equal a right one to the letter, beside always giving the most frequent answer."""
    said = [decode(row.tolist()) for row in predictions["ids"]]
    hits = np.asarray([s in example.answers for s, example in zip(said, examples, strict=True)], np.float64)
    majority = Counter(example.answers[0] for example in examples).most_common(1)[0][1]
    return EvalOutput({"accuracy": MeanMetric(hits)}, {"accuracy": majority / len(examples)}, said, example_scores=hits)


TASK = Task(
    **vars(CONTRACTS["answer"]),
    loss=loss,
    predict=predict,
    score=score,
)
