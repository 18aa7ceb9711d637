"""Question answering as VQA v2 scores it: ten people's answers count by how many gave them."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

from data_pipelines.examples import Example
from mplug2_jax.metrics.vqa import vqa_accuracy
from mplug2_jax.tasks import answer
from mplug2_jax.tasks.base import EvalOutput, HostPredictions
from mplug2_jax.tasks.contracts import CONTRACTS


def score(
    predictions: HostPredictions, examples: Sequence[Example], decode: Callable[[Sequence[int]], str]
) -> EvalOutput:
    """VQA v2's accuracy, beside always giving the most frequent answer."""
    said = [decode(row.tolist()) for row in predictions["ids"]]
    given = [example.answers for example in examples]
    commonest = Counter(answers[0] for answers in given).most_common(1)[0][0]
    accuracy = vqa_accuracy(said, given)
    return EvalOutput(
        metrics={"vqa_accuracy": accuracy},
        baselines={"vqa_accuracy": vqa_accuracy([commonest] * len(given), given).value},
        predictions=said,
        example_scores=accuracy.values,
    )


TASK = dataclasses.replace(answer.TASK, **vars(CONTRACTS["vqa"]), score=score)
