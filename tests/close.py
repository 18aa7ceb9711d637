"""Comparison of floats with one tolerance that depends neither on their scale nor on the processor.

Processors, instruction sets and compiler versions round differently and sum in a different order. The resulting errors
are proportional to the largest elements of an array: an element near zero may have a large relative error.
"""

import numbers
from typing import Any

import jax
import numpy as np

FLOAT64 = 1e-9
"""Tolerance for float64 on the host."""
CHAIN = 1e-4
"""Tolerance for float32 after a long chain of operations: whole towers, gradients, several training steps."""
BFLOAT16 = 0.03
"""Tolerance for bfloat16."""


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5, *, scale: float = 0.0) -> None:
    """Assert that every leaf of ``found`` is within ``tolerance * scale`` of ``expected``.

    Leaves are JAX, numpy or PyTorch arrays, or numbers; nested lists of numbers are one array. Both trees must have the
    same leaves and shapes, infinities and NaN at the same indices, and equal integers.

    Args:
        found: computed values.
        expected: reference values.
        tolerance: largest error, relative to ``scale``.
        scale: magnitude of the terms, for values that are small because large terms cancel (a vanishing gradient). At
            least each leaf's largest expected magnitude; if that is the scale, zeros must be exact. The bias of
            attention's keys cancels in the softmax, so its gradient is rounding noise: its scale is that of its kernel.
    """
    found_leaves, expected_leaves = _leaves(found), _leaves(expected)
    assert found_leaves.keys() == expected_leaves.keys(), (
        f"different leaves: missing {sorted(expected_leaves.keys() - found_leaves.keys())}, "
        f"unexpected {sorted(found_leaves.keys() - expected_leaves.keys())}"
    )
    assert found_leaves, "both trees are empty: nothing to compare"
    errors = {}
    for name, leaf in expected_leaves.items():
        kernel = expected_leaves.get(name.replace("key/bias", "key/kernel"), leaf)
        errors[name] = _describe_error(found_leaves[name], leaf, tolerance, max(scale, _scale(leaf), _scale(kernel)))
    messages = [f"{name or 'the value'}: {error}" for name, error in errors.items() if error]
    assert not messages, "\n".join(messages[:8] + [f"and {len(messages) - 8} more"] * (len(messages) > 8))


def assert_equal(found: Any, expected: Any) -> None:
    """Assert that every leaf of ``found`` equals that of ``expected`` exactly."""
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def max_magnitude(tree: Any) -> float:
    """Return the largest finite magnitude in a tree: the ``scale`` of differences of such numbers."""
    return max(_scale(leaf) for leaf in _leaves(tree).values())


def _leaves(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_array)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _array(leaf) for path, leaf in leaves}


def _is_array(x: Any) -> bool:
    return isinstance(x, (list, tuple)) and len(x) > 0 and all(isinstance(i, numbers.Number) or _is_array(i) for i in x)


def _array(leaf: Any) -> np.ndarray:
    if hasattr(leaf, "detach"):  # PyTorch
        leaf = leaf.detach().cpu()
        leaf = leaf.float() if leaf.is_floating_point() and leaf.itemsize < 4 else leaf
    array = np.asarray(leaf)
    return array if array.dtype.kind in "iub" else array.astype(np.float64)


def _scale(array: np.ndarray) -> float:
    return float(np.abs(array.astype(np.float64)).max(initial=0.0, where=np.isfinite(array)))


def _describe_error(found: np.ndarray, expected: np.ndarray, tolerance: float, scale: float) -> str:
    """Describe the largest error of a leaf; an empty string if it is close."""
    if found.shape != expected.shape:
        return f"shape {list(found.shape)}, expected {list(expected.shape)}"
    is_exact = found.dtype.kind != "f" and expected.dtype.kind != "f"
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    for kind, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        differs = test(found) != test(expected)
        if differs.any():
            index = tuple(map(int, np.argwhere(differs)[0]))
            return f"{kind} at different indices: at {list(index)} found {found[index]}, expected {expected[index]}"
    finite = np.isfinite(expected)
    error = np.abs(np.where(finite, found, 0) - np.where(finite, expected, 0))
    if float(error.max(initial=0.0)) <= (0.0 if is_exact else tolerance * scale):
        return ""
    index = tuple(map(int, np.unravel_index(error.argmax(), error.shape)))
    bound = "exactly" if is_exact else f"within {tolerance:.1e} of the scale {scale:.3g}"
    relative = f" ({error[index] / scale:.1e} of it)" if scale else ""
    values = f"at {list(index)} found {found[index]:.9g}, expected {expected[index]:.9g} {bound}"
    return f"{values}: off by {error[index]:.2e}{relative}"
