"""Summary scores."""

import re
from collections.abc import Sequence

import numpy as np

from mplug2_jax.metrics.metric import MeanMetric
from mplug2_jax.metrics.validation import check_same_length

KINDS = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


def rouge_scores(said: Sequence[str], references: Sequence[str]) -> dict[str, MeanMetric]:
    """Mean F-measures of ROUGE-1, 2 and L as papers quote them (times 100), by Google's package, with Porter's stemmer.

    Texts are lower-cased and split at all but a-z and 0-9 there; words of up to three letters are not stemmed.
    References without a word weigh nothing.

    Raises:
        UserError: not one said to each reference.
    """
    from rouge_score.rouge_scorer import RougeScorer  # with all of nltk and scipy.stats: two seconds of every command

    check_same_length("ROUGE", summaries=len(said), references=len(references))
    scorer = RougeScorer(list(KINDS.values()), use_stemmer=True)
    weights = np.asarray([float(has_word(reference)) for reference in references])
    each = [scorer.score(*pair) for pair in zip(references, said, strict=True)]
    return {
        name: MeanMetric(np.asarray([100 * scores[kind].fmeasure for scores in each], np.float64), weights)
        for name, kind in KINDS.items()
    }


def has_word(text: str) -> bool:
    """Whether there is something in a text that ROUGE counts."""
    return re.search("[a-z0-9]", text.lower()) is not None
