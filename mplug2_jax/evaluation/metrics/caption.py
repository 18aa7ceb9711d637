"""Caption scores."""

from collections.abc import Sequence

import numpy as np
from pycocoevalcap.cider.cider import Cider

from mplug2_jax.evaluation.metrics.ratio import Ratio


def cider(said: Sequence[str], references: Sequence[Sequence[str]]) -> Ratio:
    """CIDEr-D as papers quote it (times 100), by the COCO toolkit; texts are split at spaces, nothing else.

    Document frequencies come from the references given, so a score over few or uniform captions is not comparable.
    """
    truth = {i: list(captions) for i, captions in enumerate(references)}
    _, each = Cider().compute_score(truth, {i: [caption] for i, caption in enumerate(said)})
    return Ratio(np.asarray(each) * 100)
