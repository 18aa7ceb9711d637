"""Two runs or evaluations side by side."""

import json
from pathlib import Path
from typing import Any

import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.report import comparison, write_comparison
from mplug2_jax.report.comparison import compare, read_predictions

from .conftest import Run, results, sample
from .test_page import HOSTILE, check_self_contained


def said(*goodness: float | None, words: str = "w", **fields: Any) -> list[dict[str, Any]]:
    """Rows of a NAME.jsonl: an example for each number."""
    return [
        {"key": f"k{i}", "instruction": f"{i}?", "said": f"{words}{i}", "true": "t"}
        | ({} if value is None else {"goodness": value}) | fields
        for i, value in enumerate(goodness)
    ]  # fmt: skip


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders: "ours" right on the examples 0 to 5 of 8, "theirs" on 4 to 6."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    results(ours, "test", said=said(1, 1, 1, 1, 1, 1, 0, 0, words="a"), figures={"accuracy": 0.75})
    results(theirs, "test", 7, said=said(0, 0, 0, 0, 1, 1, 1, 0, words="b"), figures={"accuracy": 0.375})
    return ours, theirs


def test_a_figure_that_is_the_mean_of_the_same_examples_has_an_interval_of_its_difference(
    both: tuple[Path, Path],
) -> None:
    results(both[0], "mine")
    page = compare(*both)
    (only,) = page.compared
    (row,) = only.rows
    assert (page.ours, page.theirs, page.only_ours, page.only_theirs) == ("ours", "theirs", ["mine"], [])
    assert (row.figure, row.ours, row.theirs, row.difference) == ("accuracy", "75.0%", "37.5%", "+37.5 points")
    low, high = (float(end.removesuffix(" points")) for end in row.interval.split(" to "))
    assert -30 < low < 37.5 < high <= 100
    assert (only.steps, only.examples, only.shared) == ((100, 7), (8, 8), 8)
    assert [(e.key, e.ours.said, e.theirs.said) for e in only.ours_better] == [
        (f"k{i}", f"a{i}", f"b{i}") for i in range(4)
    ]
    assert [(e.key, e.our_goodness, e.their_goodness) for e in only.theirs_better] == [("k6", "0.0%", "100.0%")]


def test_examples_that_only_one_has_and_measures_that_are_no_figure_have_a_row_of_their_own(
    both: tuple[Path, Path],
) -> None:
    ours, theirs = both
    results(theirs, "test", said=said(0, 0.5, None), figures={"accuracy": 0.375, "other": 1.0})
    page = compare(ours, theirs)
    figure, mean = page.compared[0].rows
    assert (figure.figure, figure.interval) == ("accuracy", "")
    assert (mean.figure, mean.ours, mean.theirs) == ("accuracy, mean of the same examples", "100.0%", "25.0%")
    assert mean.interval == "+50.0 points to +100.0 points"
    assert page.compared[0].shared == 2


@pytest.mark.parametrize("rows", [[], said(None, None)])
def test_results_that_keep_no_goodness_are_compared_by_their_figures_alone(
    rows: list[dict[str, Any]], both: tuple[Path, Path]
) -> None:
    (both[1] / "test.jsonl").unlink()
    results(both[1], "test", said=rows, intervals={"accuracy": [0.4, 0.6]})
    page = compare(*both)
    (row,) = page.compared[0].rows
    assert (row.difference, row.interval, row.their_interval) == ("+25.0 points", "", "40.0% to 60.0%")
    assert (page.compared[0].shared, page.compared[0].ours_better, page.notes) == (0, [], [])


def test_a_run_is_compared_with_a_folder_and_frames_come_from_either(run: Run, both: tuple[Path, Path]) -> None:
    run.picture("test-0.png")
    run.evaluation("test", said=said(0, 1), samples=[sample(key="k0", frames="test-0.png")])
    first, second = (compare(*pair).compared[0] for pair in ((run.path, both[0]), (both[0], run.path)))
    assert first.theirs_better[0].strip is not None
    assert second.ours_better[0].strip == first.theirs_better[0].strip
    assert first.steps == (100, 100)


def test_evaluations_of_one_name_and_two_tasks_are_not_compared(both: tuple[Path, Path]) -> None:
    results(both[1], "test", task="caption")
    page = compare(*both)
    assert page.compared == []
    assert [note.partition(":")[0] for note in page.notes] == ["test is not compared"]


def test_an_example_that_is_there_twice_is_compared_in_its_order(both: tuple[Path, Path]) -> None:
    results(both[0], "test", said=[*said(1, words="a"), *said(0, words="c")])
    results(both[1], "test", said=[*said(0, words="b"), *said(1, words="d")])
    only = compare(*both).compared[0]
    assert [(e.ours.said, e.theirs.said) for e in only.ours_better] == [("a0", "b0")]
    assert [(e.ours.said, e.theirs.said) for e in only.theirs_better] == [("c0", "d0")]


def test_damaged_lines_are_counted_and_long_files_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, notes = tmp_path / "a.jsonl", list[str]()
    lines = [json.dumps(row) for row in said(1, 0.5, float("nan"), 0)]
    rows = [*lines, "{", "[1]", '{"said": 1}', '{"key": "x", "goodness": "high"}', "x" * 200_000, "[" * 60_000]
    path.write_text("\n".join(rows))
    assert sorted(read_predictions(path, notes)) == [("k0", 0), ("k1", 0), ("k3", 0)]
    assert len(notes) == 1
    assert "lines are damaged and left out" in notes[0]
    monkeypatch.setattr(comparison, "_MAX_FILE", len(f"{lines[0]}\n{lines[1]}\n"))
    assert sorted(read_predictions(path, notes)) == [("k0", 0), ("k1", 0)]
    assert notes[1].endswith("MiB are read")


def test_the_page_is_whole_escaped_and_never_overwritten(both: tuple[Path, Path]) -> None:
    ours, theirs = both
    rows = [row | {"key": HOSTILE, "instruction": HOSTILE, "said": HOSTILE, "true": HOSTILE} for row in said(1)]
    results(ours, "hostile", task="caption", said=rows, figures={HOSTILE: 1.0}, baselines={})
    results(theirs, "hostile", task="caption", said=[rows[0] | {"goodness": 0}], figures={HOSTILE: 0.5}, baselines={})
    results(theirs, HOSTILE.replace("/", ""))
    path = write_comparison(ours, theirs)
    assert path == ours / "against-theirs.html"
    html = path.read_text(encoding="utf-8")
    elements = check_self_contained(html)
    assert "<script" not in html
    for words in ("ours is better", "theirs is better", "only in theirs", "+37.5 points"):
        assert words in elements.text
    with pytest.raises(UserError, match=r"against-theirs\.html exists; choose another --out"):
        write_comparison(ours, theirs)
    other = write_comparison(ours, theirs, ours.parent / "new" / "page.html")
    assert other.read_text(encoding="utf-8") == html
    assert {p.name for p in other.parent.iterdir()} == {"page.html"}


def test_a_folder_with_nothing_to_compare_is_refused(both: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing holds no run"):
        write_comparison(both[0], tmp_path / "missing")
    assert not list(both[0].glob("*.html"))
