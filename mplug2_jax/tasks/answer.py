"""Question answering by generation: question and frames in, answer out."""

from collections import Counter
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from data_pipelines.examples import Example
from mplug2_jax.generation.decode import generate
from mplug2_jax.generation.rank import best_answer
from mplug2_jax.metrics.metric import MeanMetric
from mplug2_jax.model.mplug2 import Mplug2
from mplug2_jax.objectives.forward import DeviceBatch, ForwardPass, LossOutput
from mplug2_jax.objectives.language import answer_loss
from mplug2_jax.tasks.base import Decode, EvalOutput, HostPredictions, Predictions, Task, TaskContext
from mplug2_jax.tasks.specs import TASK_SPECS


def loss(forward: ForwardPass, context: TaskContext) -> LossOutput:
    """Compute the release's loss: token sums per answer over the number of questions; plus distillation if any."""
    return answer_loss(forward, context.config.distillation, context.config.label_smoothing)


def predict(model: Mplug2, batch: DeviceBatch, context: TaskContext) -> Predictions:
    """Return the ids of the best answers."""
    memory, mask = ForwardPass(model, batch).instruction_memory
    if context.answers is not None and context.num_ranked:
        best = best_answer(
            model.decoder, memory, mask, context.answers, context.tokens, num_candidates=context.num_ranked,
            double_count_first_token=context.double_count_first_token,
        )  # fmt: skip
        return {"ids": best}
    search, seeds = context.config.search, batch.get("example_id")
    output = generate(model.decoder, memory, mask, search, context.tokens, seeds, context.answers)
    generated = jnp.arange(output.ids.shape[-1]) < output.lengths[:, :1]
    return {"ids": jnp.where(generated, output.ids[:, 0], context.tokens.pad)}


def score(predictions: HostPredictions, examples: Sequence[Example], decode: Decode) -> EvalOutput:
    """Score exact matches with any reference; the baseline is always the most frequent answer."""
    answers = [decode(ids.tolist()) for ids in predictions["ids"]]
    hits = np.asarray([a in example.answers for a, example in zip(answers, examples, strict=True)], np.float64)
    majority = Counter(example.answers[0] for example in examples).most_common(1)[0][1]
    return EvalOutput({"accuracy": MeanMetric(hits)}, {"accuracy": majority / len(examples)}, answers, hits)


TASK = Task(**vars(TASK_SPECS["answer"]), loss=loss, predict=predict, score=score)
