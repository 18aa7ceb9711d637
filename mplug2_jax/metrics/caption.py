"""Caption metrics of the COCO toolkit, as papers quote them."""

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

MAX_ORDER = 4
_SMALL, _TINY = 1e-9, 1e-15  # the toolkit's constants against division by zero


@dataclasses.dataclass(frozen=True)
class Bleu(Metric):
    """BLEU of n-grams up to an order: precision and brevity over all captions together, not a mean over captions.

    The counts of a caption: its length, the length of the closest reference, its n-grams for n = 1 to 4, and how many
    of these a reference contains.
    """

    counts: Float[np.ndarray, "n 10"]
    order: int

    def __len__(self) -> int:
        return len(self.counts)

    def weighted(self, counts: Float[np.ndarray, " n"]) -> float:
        """Return the score of a resample in which each caption occurs ``counts`` times."""
        length, closest, *ngrams = (counts @ self.counts).tolist()
        total, matched = ngrams[: self.order], ngrams[MAX_ORDER : MAX_ORDER + self.order]
        precision = math.prod((m + _TINY) / (t + _SMALL) for m, t in zip(matched, total, strict=True))
        ratio = (length + _TINY) / (closest + _SMALL)
        return 100 * precision ** (1 / self.order) * math.exp(min(0.0, 1 - 1 / ratio))


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Metric]:
    """Return CIDEr-D, BLEU-1 to -4 and ROUGE-L, all times 100, of one caption per image against its references.

    All texts are tokens separated by spaces: see :func:`tokenize_captions`. CIDEr's document frequencies come from the
    given references, so its value over few or uniform captions is not comparable with others.
    """
    references_by_id = {i: list(texts) for i, texts in enumerate(references)}
    captions_by_id = {i: [text] for i, text in enumerate(captions)}
    _, cider = Cider().compute_score(references_by_id, captions_by_id)
    _, rouge = Rouge().compute_score(references_by_id, captions_by_id)
    counts = bleu_counts(captions, references)
    bleu = {f"bleu_{order}": Bleu(counts, order) for order in range(1, MAX_ORDER + 1)}
    return {"cider": MeanMetric(np.asarray(cider) * 100), **bleu, "rouge_l": MeanMetric(np.asarray(rouge) * 100)}


def tokenize_captions(texts: Sequence[str]) -> list[str]:
    """Return the Penn Treebank tokens of each text, separated by spaces."""
    return [ptb_tokenizer.tokenize(text) for text in texts]


def bleu_counts(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, "n 10"]:
    """Return the counts of `Bleu` by the toolkit's own code; texts are split at spaces."""
    scorer = BleuScorer(n=MAX_ORDER)
    for text, texts in zip(captions, references, strict=True):
        scorer += (text, list(texts))
    rows = []
    for entry in scorer.ctest:
        closest = min(entry["reflen"], key=lambda length: (abs(length - entry["testlen"]), length))
        rows.append([entry["testlen"], closest, *entry["guess"], *entry["correct"]])
    return np.asarray(rows, np.float64).reshape(-1, 2 + 2 * MAX_ORDER)
