"""Summary scores."""

import re
from collections.abc import Sequence

import numpy as np

from mplug2_jax.errors import UserError
from mplug2_jax.evaluation.metrics.pairs import check_pairs
from mplug2_jax.evaluation.metrics.ratio import Ratio

KINDS = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}


def rouge(said: Sequence[str], references: Sequence[str]) -> dict[str, Ratio]:
    """Mean F-measures of ROUGE-1, 2 and L as papers quote them (times 100), by Google's package, with Porter's stemmer.

    Texts are lower-cased and split at all but a-z and 0-9 there; words of up to three letters are not stemmed.

    Raises:
        UserError: not one said to each reference, or references without a word.
    """
    from rouge_score.rouge_scorer import RougeScorer  # with all of nltk and scipy.stats: two seconds of every command

    check_pairs("ROUGE", summaries=len(said), references=len(references))
    scorer = RougeScorer(list(KINDS.values()), use_stemmer=True)
    for i, reference in enumerate(references):
        if not re.search("[a-z0-9]", reference.lower()):
            raise UserError(
                f"ROUGE: reference {i} is {reference!r}, expected a text with a word; leave the example out"
            )
    each = [scorer.score(*pair) for pair in zip(references, said, strict=True)]
    return {
        name: Ratio(np.asarray([100 * scores[kind].fmeasure for scores in each], np.float64))
        for name, kind in KINDS.items()
    }
