"""Two runs or folders of evaluations side by side."""

import json
from pathlib import Path
from typing import Any

import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.report import comparison, write_comparison
from mplug2_jax.report.comparison import compare, read_predictions

from .conftest import Run, sample, write_results
from .test_page import HOSTILE, check_self_contained


def predictions(*scores: float | None, words: str = "w", **fields: Any) -> list[dict[str, Any]]:
    """Return lines of a NAME.jsonl: an example for each score."""
    return [
        {"key": f"k{i}", "instruction": f"{i}?", "prediction": f"{words}{i}", "reference": "t"}
        | ({} if score is None else {"score": score}) | fields
        for i, score in enumerate(scores)
    ]  # fmt: skip


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """Return two folders: "first" is correct on the examples 0 to 5 of 8, "second" on 4 to 6."""
    first, second = tmp_path / "first", tmp_path / "second"
    write_results(first, "test", predictions=predictions(1, 1, 1, 1, 1, 1, 0, 0, words="a"), metrics={"accuracy": 0.75})
    write_results(
        second, "test", 7, predictions=predictions(0, 0, 0, 0, 1, 1, 1, 0, words="b"), metrics={"accuracy": 0.375}
    )
    return first, second


def test_the_difference_of_a_metric_that_is_the_mean_of_the_same_examples_has_an_interval(
    both: tuple[Path, Path],
) -> None:
    write_results(both[0], "mine")
    page = compare(*both)
    (only,) = page.evaluations
    (row,) = only.metrics
    assert (page.first, page.second, page.only_first, page.only_second) == ("first", "second", ["mine"], [])
    assert (row.name, row.first, row.second, row.difference) == ("accuracy", "75.0%", "37.5%", "+37.5 points")
    low, high = (float(end.removesuffix(" points")) for end in row.interval.split(" to "))
    assert -30 < low < 37.5 < high <= 100
    assert (only.steps, only.num_examples, only.num_shared) == ((100, 7), (8, 8), 8)
    assert [(e.key, e.first.prediction, e.second.prediction) for e in only.first_better] == [
        (f"k{i}", f"a{i}", f"b{i}") for i in range(4)
    ]
    assert [(e.key, e.first_score, e.second_score) for e in only.second_better] == [("k6", "0.0%", "100.0%")]


def test_the_mean_over_shared_examples_has_its_own_row_if_it_is_not_a_metric(both: tuple[Path, Path]) -> None:
    first, second = both
    write_results(second, "test", predictions=predictions(0, 0.5, None), metrics={"accuracy": 0.375, "other": 1.0})
    page = compare(first, second)
    metric, mean = page.evaluations[0].metrics
    assert (metric.name, metric.interval) == ("accuracy", "")
    assert (mean.name, mean.first, mean.second) == ("accuracy, mean over shared examples", "100.0%", "25.0%")
    assert mean.interval == "+50.0 points to +100.0 points"
    assert page.evaluations[0].num_shared == 2


@pytest.mark.parametrize("rows", [[], predictions(None, None)])
def test_results_that_have_no_scores_are_compared_by_their_metrics_only(
    rows: list[dict[str, Any]], both: tuple[Path, Path]
) -> None:
    (both[1] / "test.jsonl").unlink()
    write_results(both[1], "test", predictions=rows, confidence_intervals={"accuracy": [0.4, 0.6]})
    page = compare(*both)
    (row,) = page.evaluations[0].metrics
    assert (row.difference, row.interval, row.second_interval) == ("+25.0 points", "", "40.0% to 60.0%")
    assert (page.evaluations[0].num_shared, page.evaluations[0].first_better, page.notes) == (0, [], [])


def test_a_run_is_compared_with_a_folder_and_frames_come_from_either(run: Run, both: tuple[Path, Path]) -> None:
    run.frames("test-0.png")
    run.evaluation("test", predictions=predictions(0, 1), samples=[sample(key="k0", frames="test-0.png")])
    one, other = (compare(*pair).evaluations[0] for pair in ((run.path, both[0]), (both[0], run.path)))
    assert one.second_better[0].strip is not None
    assert other.first_better[0].strip == one.second_better[0].strip
    assert one.steps == (100, 100)


def test_evaluations_of_one_name_and_two_tasks_are_not_compared(both: tuple[Path, Path]) -> None:
    write_results(both[1], "test", task="caption")
    page = compare(*both)
    assert page.evaluations == []
    assert [note.partition(":")[0] for note in page.notes] == ["test is not compared"]


def test_a_repeated_example_is_compared_in_order(both: tuple[Path, Path]) -> None:
    write_results(both[0], "test", predictions=[*predictions(1, words="a"), *predictions(0, words="c")])
    write_results(both[1], "test", predictions=[*predictions(0, words="b"), *predictions(1, words="d")])
    only = compare(*both).evaluations[0]
    assert [(e.first.prediction, e.second.prediction) for e in only.first_better] == [("a0", "b0")]
    assert [(e.first.prediction, e.second.prediction) for e in only.second_better] == [("c0", "d0")]


OLD_LINES = """\
{"key": "k0", "instruction": "0?", "said": "a", "true": "b", "goodness": 0.25}
{"key": "k1", "instruction": "1?", "said": "c", "true": "c", "goodness": 1.0}
"""


def test_predictions_of_older_versions_are_read(tmp_path: Path) -> None:
    path, notes = tmp_path / "a.jsonl", list[str]()
    path.write_text(OLD_LINES)
    rows = read_predictions(path, notes)
    assert [(row.prediction, row.reference, row.score) for row in rows.values()] == [("a", "b", 0.25), ("c", "c", 1.0)]
    assert notes == []


def test_damaged_lines_are_counted_and_long_files_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, notes = tmp_path / "a.jsonl", list[str]()
    lines = [json.dumps(row) for row in predictions(1, 0.5, float("nan"), 0)]
    rows = [*lines, "{", "[1]", '{"prediction": 1}', '{"key": "x", "score": "high"}', "x" * 200_000, "[" * 60_000]
    path.write_text("\n".join(rows))
    assert sorted(read_predictions(path, notes)) == [("k0", 0), ("k1", 0), ("k3", 0)]
    assert len(notes) == 1
    assert "damaged lines were skipped" in notes[0]
    monkeypatch.setattr(comparison, "_MAX_FILE", len(f"{lines[0]}\n{lines[1]}\n"))
    assert sorted(read_predictions(path, notes)) == [("k0", 0), ("k1", 0)]
    assert notes[1].endswith("MiB were read")


def test_the_page_is_self_contained_escaped_and_never_overwritten(both: tuple[Path, Path]) -> None:
    first, second = both
    rows = [
        row | {"key": HOSTILE, "instruction": HOSTILE, "prediction": HOSTILE, "reference": HOSTILE}
        for row in predictions(1)
    ]
    write_results(first, "hostile", task="caption", predictions=rows, metrics={HOSTILE: 1.0}, baselines={})
    write_results(
        second, "hostile", task="caption", predictions=[rows[0] | {"score": 0}], metrics={HOSTILE: 0.5}, baselines={}
    )
    write_results(second, HOSTILE.replace("/", ""))
    path = write_comparison(first, second)
    assert path == first / "against-second.html"
    html = path.read_text(encoding="utf-8")
    elements = check_self_contained(html)
    assert "<script" not in html
    for words in ("first is better", "second is better", "only in second", "+37.5 points"):
        assert words in elements.text
    with pytest.raises(UserError, match=r"against-second\.html exists; choose another --out"):
        write_comparison(first, second)
    other = write_comparison(first, second, first.parent / "new" / "page.html")
    assert other.read_text(encoding="utf-8") == html
    assert {p.name for p in other.parent.iterdir()} == {"page.html"}


def test_a_folder_with_nothing_to_compare_is_refused(both: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing holds no run"):
        write_comparison(both[0], tmp_path / "missing")
    assert not list(both[0].glob("*.html"))
