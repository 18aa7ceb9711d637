"""Summarization: a text in, a shorter one out."""

import dataclasses
from collections.abc import Sequence

from data_pipelines.examples import Example
from mplug2_jax.metrics.rouge import has_word, rouge_scores
from mplug2_jax.tasks import answer
from mplug2_jax.tasks.base import Decode, EvalOutput, HostPredictions, unscored_warning
from mplug2_jax.tasks.specs import TASK_SPECS

LEAD_WORDS = 8  # of the baseline, the length of Gigaword's headlines


def score(predictions: HostPredictions, examples: Sequence[Example], decode: Decode) -> EvalOutput:
    """Score ROUGE-1, 2 and L; the baseline is the first words of the text. The example score is ROUGE-L."""
    summaries = [decode(ids.tolist()) for ids in predictions["ids"]]
    references = [example.answers[0] for example in examples]
    lead = [" ".join(example.instruction.split()[:LEAD_WORDS]) for example in examples]
    metrics = rouge_scores(summaries, references)
    return EvalOutput(
        metrics=metrics,
        baselines={name: metric.value for name, metric in rouge_scores(lead, references).items()},
        predictions=summaries,
        example_scores=metrics["rouge_l"].values,
        warnings=unscored_warning(examples, list(map(has_word, references)), "reference summaries have no word"),
    )


TASK = dataclasses.replace(answer.TASK, **vars(TASK_SPECS["summarize"]), score=score)
