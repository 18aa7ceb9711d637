"""``assert_close`` fails when it should, at any scale of numbers."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.close import assert_close, max_magnitude

LINE = np.linspace(-1, 1, 5).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 31.0, 1e9])
def test_errors_are_relative_to_the_largest_expected_value(scale: float) -> None:
    expected = scale * LINE
    close, off = expected.copy(), expected.copy()
    close[2] += 0.9e-5 * scale  # the value itself is zero
    off[2] += 1.1e-5 * scale
    assert_close(close, expected)
    with pytest.raises(AssertionError, match=r"^the value: at \[2\] found .*, expected 0 within 1.0e-05 of the scale"):
        assert_close(off, expected)
    assert_close(off, expected, 2e-5)


def test_leaves_have_their_own_scale_and_are_named_in_the_message() -> None:
    expected = {"large": 1e6 * LINE, "small": [LINE, {"x": 1e-3 * LINE}]}
    assert_close(expected, expected)
    off = {"large": 1e6 * LINE + 1, "small": [LINE, {"x": 1e-3 * LINE + 1e-6}]}
    with pytest.raises(AssertionError) as error:
        assert_close(off, expected)
    assert str(error.value).startswith("small/1/x: at [")
    assert "large" not in str(error.value)


def test_the_scale_can_be_that_of_cancelled_terms() -> None:
    found, expected = 1e-6 * LINE, 2e-6 * LINE
    with pytest.raises(AssertionError):
        assert_close(found, expected)
    assert_close(found, expected, scale=max_magnitude({"a": LINE, "b": -3 * LINE}))
    with pytest.raises(AssertionError):
        assert_close(found, expected, scale=0.01)
    assert max_magnitude([LINE, [-3.0, np.inf]]) == 3


def test_key_biases_have_the_scale_of_their_kernels() -> None:
    def layer(noise: float, key: str = "key") -> dict[str, Any]:
        return {"layer": {key: {"kernel": LINE, "bias": np.full(3, noise)}}}

    assert_close(layer(1e-7), layer(-2e-7))
    for off in ((layer(1e-7), layer(2e-5)), (layer(1e-7, "query"), layer(-2e-7, "query"))):
        with pytest.raises(AssertionError, match="/bias: at "):
            assert_close(*off)


def test_zeros_must_be_exact() -> None:
    assert_close(np.zeros(3), np.zeros(3))
    with pytest.raises(AssertionError, match=r"at \[1\] found 1e-30, expected 0"):
        assert_close(np.asarray([0, 1e-30, 0]), np.zeros(3))


@pytest.mark.parametrize(
    ("found", "expected", "message"),
    [
        (LINE[:4], LINE, r"shape \[4\], expected \[5\]"),
        (LINE[:1], 1.0, r"shape \[1\], expected \[\]"),
        ({"a": LINE}, {"a": LINE, "b": LINE}, r"missing \['b'\], unexpected \[\]"),
        ({"a": LINE, "b": LINE}, {"a": LINE}, r"missing \[\], unexpected \['b'\]"),
        ({"a": LINE}, {"a": [LINE]}, r"missing \['a/0'\], unexpected \['a'\]"),
        ({}, {}, "both trees are empty"),
        ([1.0, np.nan], [1.0, 2.0], r"NaN at different indices: at \[1\] found nan, expected 2"),
        ([1.0, 2.0], [1.0, np.nan], r"NaN at different indices: at \[1\] found 2.0, expected nan"),
        ([np.inf, 1.0], [-np.inf, 1.0], r"\+inf at different indices: at \[0\]"),
        ([1.0, -np.inf], [1.0, -1e30], r"-inf at different indices: at \[1\]"),
        (np.asarray([100_000, 7]), np.asarray([100_001, 7]), "expected 100001 exactly"),
        (np.asarray([True]), np.asarray([False]), "exactly"),
    ],
)
def test_differences_are_named(found: Any, expected: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_close(found, expected, tolerance=0.1)


def test_equal_infinities_and_nans_pass_and_do_not_set_the_scale() -> None:
    assert_close([np.inf, np.nan, -np.inf, 1.0], [np.inf, np.nan, -np.inf, 1.0])
    with pytest.raises(AssertionError):
        assert_close([np.inf, 1.001], [np.inf, 1.0])


def test_arrays_of_any_framework_and_dtype_are_compared_by_value() -> None:
    torch = pytest.importorskip("torch")
    for line in (jnp.asarray(LINE), torch.tensor(LINE, requires_grad=True), LINE.tolist(), tuple(LINE.tolist())):
        assert_close(line, LINE)
        assert_close(LINE, line)
        with pytest.raises(AssertionError):
            assert_close(line, 2 * LINE)
    for half in (jnp.asarray(LINE, jnp.bfloat16), torch.tensor(LINE).bfloat16()):
        assert_close(half, LINE)  # exact in 16 bits
        with pytest.raises(AssertionError):
            assert_close(half, 1.01 * LINE)
