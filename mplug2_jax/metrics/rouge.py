"""Summary scores."""

import re
from collections.abc import Sequence

import numpy as np

from mplug2_jax.metrics.metric import MeanMetric
from mplug2_jax.metrics.validation import check_same_length

ROUGE_TYPES = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


def rouge_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, MeanMetric]:
    """Return the mean F-measures of ROUGE-1, 2 and L, times 100 as papers quote them.

    Computed by Google's package with Porter's stemmer, which lower-cases texts, splits them at everything but a-z and
    0-9, and does not stem words of up to three letters. References without a word have weight 0.

    Raises:
        UserError: the numbers of predictions and references differ.
    """
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk and scipy.stats, which takes two seconds

    check_same_length("ROUGE", summaries=len(predictions), references=len(references))
    scorer = RougeScorer(list(ROUGE_TYPES.values()), use_stemmer=True)
    weights = np.asarray([float(has_word(reference)) for reference in references])
    rows = [scorer.score(*pair) for pair in zip(references, predictions, strict=True)]
    return {
        name: MeanMetric(np.asarray([100 * scores[kind].fmeasure for scores in rows], np.float64), weights)
        for name, kind in ROUGE_TYPES.items()
    }


def has_word(text: str) -> bool:
    """Return whether a text has a word that ROUGE counts."""
    return re.search("[a-z0-9]", text.lower()) is not None
