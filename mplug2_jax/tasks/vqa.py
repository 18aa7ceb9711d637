"""Question answering scored as in VQA v2: an answer counts by how many of ten annotators gave it."""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from data_pipelines.examples import Example
from mplug2_jax.metrics.vqa import vqa_accuracy
from mplug2_jax.tasks import answer
from mplug2_jax.tasks.base import Decode, EvalOutput, HostPredictions
from mplug2_jax.tasks.specs import TASK_SPECS


def score(predictions: HostPredictions, examples: Sequence[Example], decode: Decode) -> EvalOutput:
    """Score VQA v2's accuracy; the baseline is always the most frequent answer."""
    answers = [decode(ids.tolist()) for ids in predictions["ids"]]
    references = [example.answers for example in examples]
    most_frequent = Counter(texts[0] for texts in references).most_common(1)[0][0]
    accuracy = vqa_accuracy(answers, references)
    return EvalOutput(
        metrics={"vqa_accuracy": accuracy},
        baselines={"vqa_accuracy": vqa_accuracy([most_frequent] * len(references), references).value},
        predictions=answers,
        example_scores=accuracy.values,
    )


TASK = dataclasses.replace(answer.TASK, **vars(TASK_SPECS["vqa"]), score=score)
