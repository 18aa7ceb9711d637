"""Whether floats agree: one measure that depends neither on the size of the numbers nor on the processor.

Processors, instruction sets and versions of the compiler round otherwise and add up in another order. What that changes
is a share of the largest numbers of an array, so an element near zero may be off by many times itself, and arrays of
large numbers by more than those of small ones.
"""

import numbers
from typing import Any

import jax
import numpy as np

FLOAT64 = 1e-9
"""Tolerance for what the host computes in float64."""
CHAIN = 1e-4
"""Tolerance for float32 after a long chain of operations: whole towers, gradients, several steps of training."""
BFLOAT16 = 0.03
"""Tolerance for what is computed in bfloat16."""


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5, *, scale: float = 0.0) -> None:
    """Raises AssertionError unless every leaf of ``found`` is within ``tolerance * scale`` of that of ``expected``.

    Leaves are arrays of JAX, numpy or PyTorch, and numbers; nested lists of numbers are one array. Both trees must have
    the same leaves and shapes, infinities and NaN in the same places, and the same integers.

    Args:
        found: what was computed.
        expected: what it should be.
        tolerance: the largest error, as a share of ``scale``.
        scale: the size of what was subtracted, for numbers that are small because large ones cancel (a gradient that
            vanishes). Otherwise, and for leaves whose largest expected magnitude is larger, it is that magnitude, so
            that zeros must be met exactly. The bias of attention's keys, which no softmax sees, has a gradient that is
            rounding noise: it is measured by the kernel beside it.
    """
    ours, theirs = _leaves(found), _leaves(expected)
    assert ours.keys() == theirs.keys(), (
        f"other leaves than expected: lacking {sorted(theirs.keys() - ours.keys())}, "
        f"besides {sorted(ours.keys() - theirs.keys())}"
    )
    assert ours, "neither tree has a leaf; expected something to compare"
    complaints = {}
    for name, leaf in theirs.items():
        size = max(scale, _scale(leaf), _scale(theirs.get(name.replace("key/bias", "key/kernel"), leaf)))
        complaints[name] = _complaint(ours[name], leaf, tolerance, size)
    wrong = [f"{name or 'the value'}: {said}" for name, said in complaints.items() if said]
    assert not wrong, "\n".join(wrong[:8] + [f"and {len(wrong) - 8} more"] * (len(wrong) > 8))


def max_magnitude(tree: Any) -> float:
    """The largest magnitude in a tree: the ``scale`` of what is left when such numbers are subtracted."""
    return max(_scale(leaf) for leaf in _leaves(tree).values())


def _leaves(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_array)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): _array(leaf) for path, leaf in leaves}


def _is_array(x: Any) -> bool:
    return isinstance(x, (list, tuple)) and len(x) > 0 and all(isinstance(i, numbers.Number) or _is_array(i) for i in x)


def _array(leaf: Any) -> np.ndarray:
    if hasattr(leaf, "detach"):  # PyTorch's
        leaf = leaf.detach().cpu()
        leaf = leaf.float() if leaf.is_floating_point() and leaf.itemsize < 4 else leaf
    array = np.asarray(leaf)
    return array if array.dtype.kind in "iub" else array.astype(np.float64)


def _scale(array: np.ndarray) -> float:
    return float(np.abs(array.astype(np.float64)).max(initial=0.0, where=np.isfinite(array)))


def _complaint(found: np.ndarray, expected: np.ndarray, tolerance: float, size: float) -> str:
    """What is wrong with a leaf of that size; nothing if it is close."""
    if found.shape != expected.shape:
        return f"shape {list(found.shape)}, expected {list(expected.shape)}"
    exact = found.dtype.kind != "f" and expected.dtype.kind != "f"
    ours, theirs = found.astype(np.float64), expected.astype(np.float64)
    for kind, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        elsewhere = test(ours) != test(theirs)
        if elsewhere.any():
            where = tuple(map(int, np.argwhere(elsewhere)[0]))
            return f"{kind} in other places: at {list(where)} found {ours[where]}, expected {theirs[where]}"
    finite = np.isfinite(theirs)
    error = np.abs(np.where(finite, ours, 0) - np.where(finite, theirs, 0))
    if float(error.max(initial=0.0)) <= (0.0 if exact else tolerance * size):
        return ""
    where = tuple(map(int, np.unravel_index(error.argmax(), error.shape)))
    bound = "exactly" if exact else f"within {tolerance:.1e} of the scale {size:.3g}"
    share = f" ({error[where] / size:.1e} of it)" if size else ""
    said = f"at {list(where)} found {ours[where]:.9g}, expected {theirs[where]:.9g} {bound}"
    return f"{said}: off by {error[where]:.2e}{share}"
