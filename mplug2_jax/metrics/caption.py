"""Caption scores of the COCO toolkit, as papers quote them."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from mplug2_jax.metrics import ptb_tokenizer
from mplug2_jax.metrics.metric import MeanMetric, Metric

ORDERS = 4
_SMALL, _TINY = 1e-9, 1e-15  # the toolkit's, so that nothing is divided by zero


@dataclasses.dataclass(frozen=True)
class Bleu:
    """BLEU of n-grams up to an order: precisions and brevity of all captions together, not a mean over captions.

    A caption's counts: its length, its closest reference's length, then its n-grams for n = 1 to 4, then how many of
    them a reference has too.
    """

    counts: Float[np.ndarray, "n 10"]
    order: int

    def __len__(self) -> int:
        """How many captions."""
        return len(self.counts)

    @property
    def value(self) -> float:
        """The score, times 100."""
        return self.weighted(np.ones(len(self)))

    def weighted(self, counts: Float[np.ndarray, " n"]) -> float:
        """The score, were each caption there so many times."""
        length, closest, *rest = (times @ self.counts).tolist()
        guessed, right = rest[: self.order], rest[ORDERS : ORDERS + self.order]
        precision = math.prod((r + _TINY) / (g + _SMALL) for r, g in zip(right, guessed, strict=True))
        ratio = (length + _TINY) / (closest + _SMALL)
        return 100 * precision ** (1 / self.order) * math.exp(min(0.0, 1 - 1 / ratio))


def caption_scores(
    said: Sequence[str], references: Sequence[Sequence[str]], tokenize: bool = True
) -> dict[str, Metric]:
    """CIDEr-D, BLEU-1 to -4 and ROUGE-L, all times 100, of a caption a picture against its references.

    CIDEr's document frequencies come from the references given, so that one over few or uniform captions is not
    comparable. Texts that are tokens with spaces between already need no ``tokenize``.
    """
    if tokenize:
        said, references = tokens(said), [tokens(each) for each in references]
    truth = {i: list(each) for i, each in enumerate(references)}
    spoken = {i: [text] for i, text in enumerate(said)}
    _, cider = Cider().compute_score(truth, spoken)
    _, rouge = Rouge().compute_score(truth, spoken)
    counts = bleu_counts(said, references)
    bleu = {f"bleu_{order}": Bleu(counts, order) for order in range(1, ORDERS + 1)}
    return {"cider": MeanMetric(np.asarray(cider) * 100), **bleu, "rouge_l": MeanMetric(np.asarray(rouge) * 100)}


def tokens(texts: Sequence[str]) -> list[str]:
    """The tokens of each text with spaces between, as papers count them."""
    return [ptb_tokenizer.tokenize(text) for text in texts]


def bleu_counts(said: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, "n 10"]:
    """What `Bleu` adds up, by the toolkit's own counting; texts are split at spaces."""
    scorer = BleuScorer(n=ORDERS)
    for text, each in zip(said, references, strict=True):
        scorer += (text, list(each))
    rows = []
    for found in scorer.ctest:
        closest = min(found["reflen"], key=lambda length: (abs(length - found["testlen"]), length))
        rows.append([found["testlen"], closest, *found["guess"], *found["correct"]])
    return np.asarray(rows, np.float64).reshape(-1, 2 + 2 * ORDERS)
