"""How far apart floats may be that two programs computed from the same numbers.

Processors, their instruction sets and compilers round otherwise and add up in another order. What that changes is a
share of the largest values of an array: so errors are measured by those, whatever their size.
"""

import numpy as np

from mplug2_jax.conversion.files.sources import HostArray

ACTIVATION_TOLERANCE = 1e-5
"""Of activations, losses, scores and probabilities in float32, as a share of their array's largest magnitude.

On the goldens errors are up to 1.8e-6, with any instruction set from SSE4.2 to AVX-512, by either framework.
"""


def errors(ours: HostArray, theirs: HostArray) -> tuple[float, float]:
    """The largest difference, and its share of the largest magnitude of ``theirs``; a single number is its own scale.

    Zeros must be met exactly: beside nothing else, any difference is infinitely large. With NaN on either side both
    are NaN, which is within no tolerance.
    """
    reference = theirs.astype(np.float64)
    absolute = float(np.abs(ours.astype(np.float64) - reference).max(initial=0.0))
    scale = float(np.abs(reference).max(initial=0.0))
    return absolute, share(absolute, scale)


def share(error: float, scale: float) -> float:
    """An error as a share of a scale; of a scale of 0 none is 0 and any other infinite."""
    if scale:
        return float(error / scale)
    return 0.0 if error == 0 else np.inf if error > 0 else np.nan
