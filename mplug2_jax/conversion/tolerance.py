"""Tolerance between floats that two programs compute from the same numbers.

CPUs, instruction sets and compilers round differently and sum in another order. The errors scale with the largest
magnitude of an array, so they are measured relative to it.
"""

import numpy as np

from mplug2_jax.conversion.files.sources import HostArray

ACTIVATION_TOLERANCE = 1e-5
"""For activations, losses, scores and probabilities in float32, relative to their array's largest magnitude.

On the goldens errors are up to 1.8e-6, with any instruction set from SSE4.2 to AVX-512, in either framework.
"""


def max_errors(actual: HostArray, expected: HostArray) -> tuple[float, float]:
    """Return the largest absolute difference, and the same relative to the largest magnitude of ``expected``.

    If all of ``expected`` is zero, any difference is infinite. With NaN on either side both are NaN, which is within no
    tolerance.
    """
    reference = expected.astype(np.float64)
    absolute = float(np.abs(actual.astype(np.float64) - reference).max(initial=0.0))
    scale = float(np.abs(reference).max(initial=0.0))
    return absolute, relative_error(absolute, scale)


def relative_error(error: float, scale: float) -> float:
    """Return an error relative to a scale; at a scale of 0, that is 0 without an error and infinite with one."""
    if scale:
        return float(error / scale)
    return 0.0 if error == 0 else np.inf if error > 0 else np.nan
