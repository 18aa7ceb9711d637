"""Evaluations as plain data: the last of each name, damaged files noted, images only from their own folder."""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mplug2_jax.metrics.units import is_fraction
from mplug2_jax.report import results
from mplug2_jax.report.names import task_labels
from mplug2_jax.report.published import published_results
from mplug2_jax.report.results import Evaluation, read_evaluations
from mplug2_jax.tasks.table import TASKS

from .conftest import Run, sample


def read(run: Run, *order: str) -> tuple[dict[str, Evaluation], list[str]]:
    notes: list[str] = []
    return {evaluation.name: evaluation for evaluation in read_evaluations(run.path, order, notes)}, notes


def test_the_last_step_of_each_name_is_read(run: Run) -> None:
    for step in (5, 20, 100):
        run.evaluation("often", step)
    run.evaluation("once", 20)
    (run.path / "evaluations" / "300").mkdir()
    (run.path / "evaluations" / "999.tmp").mkdir()
    found, notes = read(run)
    assert {name: evaluation.step for name, evaluation in found.items()} == {"often": 100, "once": 20}
    assert notes == []


def test_the_order_is_the_configs_then_by_name(run: Run) -> None:
    for name in ("a", "b", "c", "d"):
        run.evaluation(name)
    assert list(read(run, "d", "b")[0]) == ["d", "b", "a", "c"]


def test_metrics_are_shown_with_their_baselines(run: Run) -> None:
    metrics = {"accuracy": 0.381, "cider": 61.23, "text_to_visual_r5": 0.02, "lost": None, "alone": 0.5}
    baselines, intervals = {"accuracy": 0.25, "cider": 5.0, "text_to_visual_r5": 0.04}, {"accuracy": [0.3, 0.4567]}
    run.evaluation("a", metrics=metrics, baselines=baselines, confidence_intervals=intervals)
    shown = {row.name: row for row in read(run)[0]["a"].metric_rows}
    assert [shown["accuracy"].value, shown["accuracy"].baseline, shown["accuracy"].ratio] == ["38.1%", "25.0%", "1.5×"]
    assert (shown["accuracy"].interval, shown["CIDEr"].interval) == ("30.0% to 45.7%", "")
    assert [shown["CIDEr"].value, shown["CIDEr"].ratio] == ["61.2", "12×"]
    assert shown["text → image R@5"].below_baseline
    assert not shown["accuracy"].below_baseline
    assert (shown["lost"].value, shown["lost"].bar) == ("–", 0.0)
    assert (shown["alone"].baseline, shown["alone"].baseline_mark) == ("–", None)


def test_the_bar_of_a_rank_is_longer_for_the_better(run: Run) -> None:
    run.frames("a-0.png", num_frames=1)
    metrics = {"text_to_visual_median_rank": 2.0, "visual_to_text_median_rank": 40.0}
    run.evaluation("a", metrics=metrics, baselines=dict.fromkeys(metrics, 20.0), samples=[sample(frames="a-0.png")])
    good, bad = read(run)[0]["a"].metric_rows
    assert (good.name, bad.name) == ("text → image median rank", "image → text median rank")
    assert (good.bar, good.baseline_mark, good.below_baseline) == (50.0, 5.0, False)
    assert (bad.bar, bad.baseline_mark, bad.below_baseline) == (2.5, 5.0, True)


def test_a_video_is_called_a_video(run: Run) -> None:
    run.frames("a-0.png", num_frames=4)
    run.evaluation("a", metrics={"text_to_visual_r1": 0.3}, samples=[sample(frames="a-0.png")])
    assert [row.name for row in read(run)[0]["a"].metric_rows] == ["text → video R@1"]


def test_absent_metrics_are_shown_as_absent(run: Run) -> None:
    run.evaluation("a", metrics={"cider": 61.23}, absent=["meteor", "<b>"])
    shown = {row.name: row for row in read(run)[0]["a"].metric_rows}
    assert [shown[name].value for name in ("CIDEr", "METEOR", "<b>")] == ["61.2", "absent", "absent"]
    assert (shown["METEOR"].bar, shown["METEOR"].baseline_mark, shown["METEOR"].below_baseline) == (0.0, None, False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("", "Expecting value"),
        ('{"task": "answer", "metr', "Unterminated string"),
        ("[1, 2]", "list"),
        ("null", "NoneType"),
        ("[" * 100_000, "recursion"),
        ({"task": None}, "'task' is missing"),
        ({"metrics": {"accuracy": "high"}}, "could not convert"),
        ({"metrics": {"accuracy": 10**400}}, "too large"),
        ({"num_examples": math.inf}, "infinity"),
        ({"confidence_intervals": {"accuracy": [0.1]}}, "not enough values"),
        ({"confidence_intervals": {"accuracy": [0.1, None]}}, "NoneType"),
        ({"confusion": {"classes": ["a", "b"], "counts": [[1, 2], [3]]}}, "not a square"),
        ({"confusion": {"classes": ["a"] * 21, "counts": [[0] * 21] * 21}}, "not a square of at most 20"),
        ({"confusion": {"classes": ["a"], "counts": [[-1]]}}, "negative count"),
        ({"confusion": {"mistakes": [["a", "b"]]}}, "not enough values"),
        ({"samples": ["x"]}, ""),
        ({"samples": [{"prediction": "x"}]}, "'references' is missing"),
    ],
)
def test_a_damaged_file_is_noted_and_the_evaluation_before_it_shown(run: Run, damage: Any, message: str) -> None:
    run.evaluation("a", 5)
    run.evaluation("b", 100)
    path = run.evaluation("a", 100, **(damage if isinstance(damage, dict) else {}))
    if isinstance(damage, str):
        path.write_text(damage)
    found, notes = read(run)
    assert {name: evaluation.step for name, evaluation in found.items()} == {"a": 5, "b": 100}
    assert len(notes) == 1
    assert notes[0].startswith("evaluations/100/a.json is damaged and was skipped: ")
    assert message in notes[0]


def test_a_strip_comes_along_whole(run: Run) -> None:
    image = run.frames("a-0.png", num_frames=4)
    run.evaluation("a", samples=[sample(frames="a-0.png"), sample()])
    first, second = read(run)[0]["a"].samples
    assert first.strip is not None
    assert (first.strip.width, first.strip.height, first.strip.frames) == (32, 8, 4)
    kind, _, data = first.strip.uri.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == image.read_bytes()
    assert second.strip is None


def test_a_large_strip_becomes_a_small_jpeg(run: Run) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (400, 3200, 3), np.uint8)
    (run.path / "evaluations/100").mkdir(parents=True)
    Image.fromarray(pixels).save(run.path / "evaluations/100/a-0.png")
    run.evaluation("a", samples=[sample(frames="a-0.png")])
    strip = read(run)[0]["a"].samples[0].strip
    assert strip is not None
    assert strip.frames == 8
    kind, _, data = strip.uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (strip.width, strip.height)
        assert strip.width <= 2160
        assert strip.height <= 320


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png", "../../secret.png", "/secret.png", "./a-0.png", ".", "..", "", "a/../a-0.png",
        "..\\secret.png", "link.png", "a-0.png\0", "missing.png", "x" * 5000, "\ud800.png", 7, ["a-0.png"], {"a": 1},
        "note.png", "cut.png", "photo.png",
    ],
)  # fmt: skip
def test_frames_that_are_not_an_image_in_the_same_folder_are_refused_and_noted(run: Run, name: Any) -> None:
    image = run.frames("a-0.png")
    folder = image.parent
    secret = run.path / "evaluations" / "secret.png"
    secret.write_bytes(image.read_bytes())
    (run.path / "secret.png").write_bytes(image.read_bytes())
    (folder / "link.png").symlink_to(secret)
    (folder / "note.png").write_text("not an image")
    (folder / "cut.png").write_bytes(image.read_bytes()[:-40])
    Image.new("RGB", (9, 9)).save(folder / "photo.png", "JPEG")
    path = str(secret) if name == "/secret.png" else name
    run.evaluation("a", samples=[sample(frames=path), sample(frames="a-0.png")])
    found, notes = read(run)
    refused, shown = found["a"].samples
    assert refused.strip is None
    assert shown.strip is not None
    assert len(notes) == 1
    assert notes[0].startswith("evaluations/100/a.json: an image was skipped: ")


def test_an_image_file_that_is_too_large_is_not_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    size = run.evaluation("a", samples=[sample(frames="a-0.png")]).stat().st_size
    monkeypatch.setattr(results, "_MAX_FILE", size)
    image = run.frames("a-0.png", num_frames=9)
    assert image.stat().st_size > size
    found, notes = read(run)
    assert found["a"].samples[0].strip is None
    assert "is larger than" in notes[0]


def test_a_result_that_is_too_large_is_not_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.evaluation("a")
    monkeypatch.setattr(results, "_MAX_FILE", 100)
    found, notes = read(run)
    assert found == {}
    assert "a.json is damaged and was skipped: it is larger than" in notes[0]


def test_no_damaged_image_stops_the_page(run: Run) -> None:
    whole = run.frames("a-0.png").read_bytes()
    rng = np.random.default_rng(0)
    for i in range(300):
        data = bytearray(whole[: rng.integers(len(whole))] if i % 2 else whole)
        for _ in range(3):
            if data:
                data[rng.integers(len(data))] = rng.integers(256)
        (run.path / "evaluations/100" / f"{i}.png").write_bytes(data)
    run.evaluation("a", samples=[sample(frames=f"{i}.png") for i in range(300)])
    found, notes = read(run)
    assert len(found["a"].samples) == 300
    assert notes
    assert all(note.startswith("evaluations/100/a.json: an image was skipped") for note in notes)


def test_words_that_differ_are_marked_for_masked_words_alone(run: Run) -> None:
    pair = sample(prediction="the eight is top", references=["the eight is purple"], text="the eight is purple")
    longer = sample(prediction="the the eight", references=["the eight is purple"])
    run.evaluation("masked", task="mlm", samples=[pair, longer])
    run.evaluation("answers", task="answer", samples=[pair])
    found, _ = read(run)
    same, other = found["masked"].samples

    def marked(words: Any) -> list[str]:
        return [word.text for word in words if word.differs]

    assert (marked(same.prediction), marked(same.reference)) == (["top"], ["purple"])
    assert (marked(other.prediction), marked(other.reference)) == (["the"], ["is", "purple"])
    assert marked(found["answers"].samples[0].prediction) == []


def test_the_examples_own_caption_is_shown_of_several_right_ones(run: Run) -> None:
    run.evaluation("a", task="caption", samples=[sample(prediction="c", text="b", references=["a", "b", "c"])])
    (only,) = read(run)[0]["a"].samples
    assert [word.text for word in only.reference] == ["b"]
    assert list(only.other_references) == ["a", "c"]
    assert only.correct


def test_samples_are_grouped_by_category_and_those_without_are_the_first(run: Run) -> None:
    samples = [
        sample(category=category, score=score)
        for category, score in (("first", 0.25), ("best", 0.75), ("best", 0.5), ("worst", 0))
    ]
    run.evaluation("new", task="vqa", samples=samples)
    run.evaluation("old", samples=[sample(), sample()])
    run.evaluation("odd", samples=[sample(category="other")])
    found, _ = read(run)
    assert [(heading, [s.score for s in group]) for heading, group in found["new"].groups] == [
        ("First", ["25.0%"]), ("Best", ["75.0%", "50.0%"]), ("Worst", ["0.0%"])
    ]  # fmt: skip
    assert [(heading, len(group)) for heading, group in found["old"].groups] == [("", 2)]
    assert [(heading, [s.score for s in group]) for heading, group in found["odd"].groups] == [("", [""])]


def test_a_sample_of_retrieval_has_its_neighbors(run: Run) -> None:
    run.frames("a-0-nearest.png", num_frames=3)
    texts = [{"text": "a four", "correct": False}, {"text": "a five", "correct": True}]
    images = {"frames": "a-0-nearest.png", "correct": [False, False, True]}
    run.evaluation("a", task="vlc", samples=[sample(nearest_texts=texts, nearest_images=images, score=-2)])
    run.evaluation("b", task="vlc", samples=[sample(nearest_images={"frames": "../a.png", "correct": [True]})])
    found, notes = read(run)
    (only,) = found["a"].samples
    assert only.nearest_texts == [("a four", False), ("a five", True)]
    assert only.nearest_images is not None
    assert (only.nearest_images.frames, only.correct_images) == (3, [False, False, True])
    assert only.score == "-2"
    assert found["b"].samples[0].nearest_images is None
    assert len(notes) == 1


def test_confusions_have_the_percentage_of_each_row(run: Run) -> None:
    run.evaluation("few", confusion={"classes": ["a", "b"], "counts": [[3, 1], [0, 0]]})
    run.evaluation("many", confusion={"mistakes": [["cat", "dog", 7]]})
    found, _ = read(run)
    few, many = found["few"].confusion, found["many"].confusion
    assert few is not None
    assert many is not None
    assert [[(cell.count, cell.percent, cell.correct) for cell in row] for row in few.rows] == [
        [(3, 75.0, True), (1, 25.0, False)], [(0, 0.0, False), (0, 0.0, True)]
    ]  # fmt: skip
    assert many.mistakes == [("cat", "dog", 7)]


@pytest.mark.parametrize(
    ("fields", "value"),
    [
        ({"recipe": "msrvtt_qa", "formats": ["annotations"]}, "48.0%"),
        ({"recipe": "msrvtt_qa", "formats": ["annotations", "digitworld"]}, ""),  # a placeholder for the data set
        ({"recipe": "released_videoqa", "formats": ["annotations"]}, ""),  # of MSRVTT, MSVD or TGIF
        ({"recipe": "demo", "formats": ["annotations"]}, ""),
        ({}, ""),  # an old file
    ],
)
def test_published_results_of_a_data_set_are_shown_with_its_metrics(run: Run, fields: Any, value: str) -> None:
    run.evaluation("test", metrics={"accuracy": 0.4, "other": 0.5}, **fields)
    shown = read(run)[0]["test"].metric_rows
    assert [row.published for row in shown] == [value, ""]
    assert shown[0].note == ("fine-tuned; paper abstract; official README" if value else "")


def test_every_published_result_is_a_metric_of_the_recipe_of_this_name(repository: Path) -> None:
    for row in json.loads((repository / "mplug2_jax" / "report" / "published.json").read_text())["results"]:
        assert (repository / "configs" / "tasks" / f"{row['task']}.py").is_file()
        found = published_results(row["task"], ["annotations"])
        names = set(found)
        assert names <= {"accuracy", "cider", "top_1", "top_5", "text_to_visual_r1", "text_to_visual_r10"}
        assert row["value"] in [pytest.approx(100 * each.value if is_fraction(name) else each.value)
                                for name, each in found.items()]  # fmt: skip


def test_every_task_that_is_evaluated_has_labels() -> None:
    for name, task in TASKS.items():
        if task.score is not None:
            labels = task_labels(name)
            assert labels.baseline, name
            assert labels.score != "score", name


OLD_RESULT = """\
{"name": "a", "task": "summarise", "recipe": "x", "formats": ["annotations"], "step": 7, "examples": 3, "seconds": 1.5,
 "figures": {"rouge_l": 40.0, "lost": null}, "intervals": {"rouge_l": [30.0, 50.0]}, "baselines": {"rouge_l": 20.0},
 "absent": [], "warnings": [], "skipped": [],
 "samples": [{"key": "k", "instruction": "", "text": "long", "said": "short", "true": ["brief"], "goodness": 40.0,
  "why": "worst", "nearest_texts": [{"text": "t", "right": true}], "nearest_pictures": {"right": [true]}}]}
"""


def test_results_of_older_versions_are_read(run: Run) -> None:
    path = run.evaluation("a")
    path.write_text(OLD_RESULT)
    found, notes = read(run)
    evaluation, (sample,) = found["a"], found["a"].samples
    assert (evaluation.task, evaluation.step, evaluation.num_examples, notes) == ("summarize", 7, 3, [])
    row = evaluation.metric_rows[0]
    assert (row.name, row.value, row.interval, row.ratio) == ("ROUGE-L", "40.0", "30.0 to 50.0", "2.0×")
    assert ([word.text for word in sample.prediction], [word.text for word in sample.reference]) == (
        ["short"],
        ["brief"],
    )
    assert (sample.score, sample.category) == ("40.0", "worst")
    assert (sample.nearest_texts, sample.correct_images) == ([("t", True)], [True])


def test_an_unknown_task_has_generic_labels(run: Run) -> None:
    path = run.evaluation("a", task="telepathy", samples=[sample()])
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"invented": 1}))
    assert read(run)[0]["a"].labels.score == "score"
