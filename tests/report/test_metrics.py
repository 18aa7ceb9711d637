"""Metrics files as curves: long ones stay small and true, damaged ones are read as far as they go."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.report.metrics import MAX_POINTS, Curve, read_metrics
from tests.close import FLOAT64, assert_close, max_magnitude


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(lines))
    return path


def test_a_hundred_thousand_lines_become_a_bounded_curve_with_true_means_and_extremes(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[54_321] = 1e6  # the one step that went wrong
    lines = (b'{"step": %d, "loss": %r}\n' % (i + 1, float(value)) for i, value in enumerate(values))
    metrics = read_metrics(write(tmp_path / "metrics.jsonl", *lines))
    curve = metrics.curves["loss"]
    assert (metrics.last_step, metrics.damaged, curve.not_finite) == (100_000, 0, 0)
    assert 100 < len(curve) <= MAX_POINTS
    assert curve.binned
    assert curve.last == values[-1]
    # Steps tell where each bin begins and ends: bins are consecutive and cover everything.
    middles = curve.steps
    edges = [0]
    for middle in middles:
        edges.append(int(2 * middle) - edges[-1] - 1)
    assert edges[-1] == 100_000
    for i, (first, last) in enumerate(itertools.pairwise(edges)):
        its = values[first:last]
        assert_close(curve.means[i], its.mean(), FLOAT64, scale=max_magnitude(its))
        assert (curve.lows[i], curve.highs[i]) == (its.min(), its.max())
    assert curve.highs.max() == 1e6


@given(
    values=st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=3000),
    cuts=st.lists(st.integers(0, 3000), max_size=4),
)
def test_bins_keep_the_total_and_the_extremes_however_the_values_arrive(values: list[float], cuts: list[int]) -> None:
    curve = Curve()
    edges = sorted({0, len(values), *(min(cut, len(values)) for cut in cuts)})
    for start, stop in itertools.pairwise(edges):
        curve.extend(list(range(start, stop)), values[start:stop])
    finite = [value for value in values if math.isfinite(value)]
    assert len(curve) <= MAX_POINTS
    assert curve.not_finite == len(values) - len(finite)
    assert (np.diff(curve.steps) > 0).all()
    if finite:
        assert curve.last == finite[-1]
        assert (np.nanmin(curve.lows), np.nanmax(curve.highs)) == (min(finite), max(finite))
        drawn = curve.means[np.isfinite(curve.means)]
        assert min(finite) - 1e-6 <= drawn.min() <= drawn.max() <= max(finite) + 1e-6
    else:
        assert math.isnan(curve.last)
        assert np.isnan(curve.means).all()


def test_short_files_are_kept_point_by_point(tmp_path: Path) -> None:
    path = write(tmp_path / "m", b'{"step": 10, "loss": 3.0}\n', b'{"step": 20, "loss": 1.0, "eval/a/cider": 7}\n')
    metrics = read_metrics(path)
    assert metrics.curves["loss"].steps.tolist() == [10, 20]
    assert metrics.curves["loss"].means.tolist() == [3, 1]
    assert metrics.curves["eval/a/cider"].means.tolist() == [7]
    assert not metrics.curves["loss"].binned


def test_two_files_are_one_story(tmp_path: Path) -> None:
    run = write(
        tmp_path / "m", b'{"step": 10, "loss": 3.0}\n', b'{"step": 30, "loss": 1.0}\n', b'{"step": 30, "eval/a/b": 7}\n'
    )
    follower = write(
        tmp_path / "e", b'{"step": 10, "eval/a/b": 5}\n', b"{\n", b'{"step": 20, "eval/a/b": 6}\n', b'{"step": 3'
    )
    metrics = read_metrics(run, follower, tmp_path / "none")
    assert metrics.curves["eval/a/b"].steps.tolist() == [10, 20, 30]
    assert metrics.curves["eval/a/b"].means.tolist() == [5, 6, 7]
    assert metrics.curves["loss"].means.tolist() == [3, 1]
    assert (metrics.last_step, metrics.damaged) == (30, 1)


def test_of_several_values_of_a_step_the_last_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "m", *(b'{"step": 5, "eval/a/cider": %d}\n' % value for value in (1, 2, 3)))
    curve = read_metrics(path).curves["eval/a/cider"]
    assert (curve.steps.tolist(), curve.means.tolist(), curve.last) == ([5], [3], 3)


@pytest.mark.parametrize("written", ["null", "NaN", "Infinity", "-Infinity"])
def test_values_that_are_not_finite_leave_a_gap_and_are_counted(written: str, tmp_path: Path) -> None:
    lines = (f'{{"step": {i}, "loss": {value}}}\n'.encode() for i, value in enumerate(["1.0", written, "3.0"]))
    curve = read_metrics(write(tmp_path / "m", *lines)).curves["loss"]
    assert curve.not_finite == 1
    assert curve.last == 3.0
    np.testing.assert_array_equal(curve.means, [1.0, math.nan, 3.0])


DAMAGED = {
    "no JSON": b"what is this\n",
    "no object": b"[1, 2]\n",
    "no step": b'{"loss": 1}\n',
    "a step that is no number": b'{"step": "ten", "loss": 1}\n',
    "a value that is no number": b'{"step": 3, "loss": {"a": 1}}\n',
    "a value beyond floats": b'{"step": 3, "loss": 1' + b"0" * 400 + b"}\n",
    "a step beyond floats": b'{"step": 1' + b"0" * 400 + b', "loss": 1}\n',
    "bytes": bytes(range(128, 256)).replace(b"\n", b"") + b"\n",
    "nested without end": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_is_counted_and_the_rest_is_read(line: bytes, tmp_path: Path) -> None:
    good = [json.dumps({"step": i, "loss": float(i)}).encode() + b"\n" for i in (1, 2)]
    metrics = read_metrics(write(tmp_path / "m", good[0], line, good[1]))
    assert metrics.damaged == 1
    assert metrics.curves["loss"].means.tolist() == [1, 2]
    assert metrics.last_step == 2


def test_a_line_that_is_still_being_written_is_no_damage(tmp_path: Path) -> None:
    metrics = read_metrics(write(tmp_path / "m", b'{"step": 1, "loss": 2}\n', b"\n", b'{"step": 2, "lo'))
    assert metrics.damaged == 0
    assert metrics.last_step == 1


def test_no_file_and_an_empty_file_hold_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", write(tmp_path / "m")):
        metrics = read_metrics(path)
        assert (metrics.curves, metrics.last_step, metrics.damaged) == ({}, 0, 0)
