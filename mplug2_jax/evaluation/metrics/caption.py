"""Caption scores."""

from collections.abc import Sequence

from pycocoevalcap.cider.cider import Cider


def cider(said: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D as papers quote it (times 100), by the COCO toolkit; texts are split at spaces, nothing else.

    Document frequencies come from the references given, so a score over few or uniform captions is not comparable.
    """
    truth = {i: list(captions) for i, captions in enumerate(references)}
    result, _ = Cider().compute_score(truth, {i: [caption] for i, caption in enumerate(said)})
    return float(result) * 100
