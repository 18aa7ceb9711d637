"""Summarisation: a text in, a shorter one out."""

import dataclasses
from collections.abc import Callable, Sequence

from data_pipelines.examples import Example
from mplug2_jax.metrics.rouge import has_word, rouge_scores
from mplug2_jax.tasks import answer
from mplug2_jax.tasks.base import EvalOutput, HostPredictions, unscored_warning
from mplug2_jax.tasks.contracts import CONTRACTS


def score(
    predictions: HostPredictions, examples: Sequence[Example], decode: Callable[[Sequence[int]], str]
) -> EvalOutput:
    """ROUGE-1, 2 and L, beside the first words of the text: eight of them, as Gigaword's headlines have.

    How good a summary is, is its ROUGE-L.
    """
    said = [decode(row.tolist()) for row in predictions["ids"]]
    true = [example.answers[0] for example in examples]
    lead = [" ".join(example.instruction.split()[:8]) for example in examples]
    figures = rouge_scores(said, true)
    return EvalOutput(
        metrics=figures,
        baselines={name: figure.value for name, figure in rouge_scores(lead, true).items()},
        predictions=said,
        example_scores=figures["rouge_l"].values,
        warnings=unscored_warning(examples, list(map(has_word, true)), "summaries to say have no word"),
    )


TASK = dataclasses.replace(answer.TASK, **vars(CONTRACTS["summarize"]), score=score)
