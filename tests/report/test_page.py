"""The page: self-contained, escaped, written atomically, and robust against damaged files."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.report import curves, write_report
from tests.pages import Elements

from .conftest import CONFIG, Run, sample, write_results

HOSTILE = "<script>alert(1)</script><img src=http://evil/x onerror=alert(1)>\"'&{{ page }}{% for %}</title></style>"


def report(run: Run) -> str:
    return write_report(run.path).read_text(encoding="utf-8")


def check_self_contained(html: str) -> Elements:
    """Fail on anything that loads or runs something, on tags that do not nest, and on repeated ids."""
    elements = Elements(html)
    assert elements.open == []
    ids: list[str | None] = []
    for tag, attributes in elements.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "a", "image")
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("href", "srcset", "action")
            assert name != "src" or str(value).startswith("data:image/")
            assert name != "xlink:href" or str(value).startswith("#")
            assert "url(" not in str(value) or str(value).startswith("url(#")
            if name == "id":
                ids.append(value)
    assert len(ids) == len(set(ids))
    (style,) = re.findall(r"<style.*?</style>", html, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    return elements


@pytest.fixture
def full(run: Run) -> Run:
    """Return a run with curves of every group, evaluations at two steps, and images."""
    for step in range(1, 41):
        run.metrics(
            {
                "step": step, "loss": 9.0 / step, "gradient_norm": 100.0 / step**2, "learning_rate/rest": 1e-3,
                "learning_rate/vision": 1e-4, "image_text/vlc/loss": 2.0 / step, "image_text/ilm/accuracy": step / 40,
                "examples_per_second": 120.0, "data_wait": 0.02, "mfu": 0.4, "extra_thing": float(step),
            }
        )  # fmt: skip
    for step in (20, 40):
        run.metrics({"step": step, "eval/image_question/accuracy": step / 100})
        run.frames("image_question-0.png", step)
        run.evaluation("image_question", step, samples=[sample(frames="image_question-0.png")])
    return run


def test_a_page_needs_no_other_file_and_no_network(full: Run) -> None:
    html = report(full)
    elements = check_self_contained(html)
    assert "http://" not in html
    assert "https://" not in html
    assert "<script" not in html
    assert sum(tag == "img" for tag, _ in elements.elements) == 1
    assert sum(tag == "figure" for tag, _ in elements.elements) == 10
    for title in ("Losses · image text", "Training accuracy", "Throughput", "Evaluations", "Other", "synthetic"):
        assert title in elements.text
    assert re.search(r"40\s+of 100 steps", elements.text)
    assert "32, then 64 examples per step of digitworld image" in elements.text


def test_scores_have_a_panel_of_their_own_beside_the_shares_of_the_same_evaluation(run: Run) -> None:
    for step in (20, 40):
        run.metrics({"step": step, "eval/a/cider": 60.0, "eval/a/bleu_4": 30.0, "eval/a/accuracy": 0.5})
    html = report(run)
    elements = check_self_contained(html)
    assert sum(tag == "figure" for tag, _ in elements.elements) == 2
    for words in ("a, scores", "CIDEr", "BLEU-4", "accuracy"):
        assert words in elements.text


def test_the_same_directory_gives_the_same_page(full: Run) -> None:
    assert report(full) == report(full)


def test_hostile_text_is_shown_and_does_nothing(run: Run) -> None:
    references = [HOSTILE, HOSTILE + "2"]
    hostile = sample(key=HOSTILE, instruction=HOSTILE, text=HOSTILE, prediction=HOSTILE, references=references)
    metrics = {HOSTILE: 0.5}
    run.evaluation("a", task="mlm", samples=[hostile, sample(frames=HOSTILE)], metrics=metrics, baselines=metrics)
    run.evaluation("<img src=x onerror=alert(1)>", task="caption", samples=[hostile])
    run.evaluation("<b>damaged", metrics=None)
    run.config(
        CONFIG
        | {
            "name": HOSTILE, HOSTILE: HOSTILE, "deep": {HOSTILE: [HOSTILE]},
            "model": {"vision_layers": HOSTILE, "image_size": HOSTILE, "text_layers": HOSTILE, "width": HOSTILE},
            "streams": {
                HOSTILE: {
                    "data": {"sources": {HOSTILE: {"format": HOSTILE, "kind": HOSTILE}}, "batch_size": HOSTILE},
                    "objectives": {HOSTILE: HOSTILE},
                }
            },
        }
    )  # fmt: skip
    run.metrics(*({"step": i, HOSTILE: i, f"{HOSTILE}/a/loss": i, f"eval/a/{HOSTILE}": i} for i in range(3)))
    html = report(run)
    elements = check_self_contained(html)
    assert "<script" not in html
    assert elements.text.count("<script>alert(1)</script>") > 10
    assert [attributes.get("title") for tag, attributes in elements.elements if tag == "article"].count(HOSTILE) == 2
    assert {tag for tag, _ in elements.elements} & {"img", "b"} == {"b"}


@pytest.mark.parametrize(
    "text", ["\ud800 alone", "\0 nothing", "\x1b[31m red", "\u202e turned", "a\r\nb", "😀" * 500, "-->", "]]>"]
)
def test_strange_characters_make_a_page_that_is_utf8(run: Run, text: str) -> None:
    run.config(CONFIG | {"name": text, text: text})
    run.evaluation("a", samples=[sample(prediction=text, key=text)])
    run.metrics({"step": 1, text: 1})
    assert check_self_contained(report(run))


def test_frames_outside_of_the_folder_are_skipped_and_noted(run: Run) -> None:
    run.frames("secret.png").rename(run.path / "secret.png")
    run.evaluation("a", samples=[sample(frames="../../secret.png")])
    elements = check_self_contained(report(run))
    assert "img" not in {tag for tag, _ in elements.elements}
    assert "Notes" in elements.text
    assert "'../../secret.png' is not the plain name of a file in the same folder" in elements.text


def test_best_and_worst_samples_confusions_neighbors_and_published_results_are_drawn(run: Run) -> None:
    run.frames("test-0-nearest.png", num_frames=2)
    near = {
        "nearest_texts": [{"text": HOSTILE, "correct": True}],
        "nearest_images": {"frames": "test-0-nearest.png", "correct": [False, True]},
    }
    run.evaluation(
        "test", task="vlc", recipe="msrvtt_retrieval", formats=["annotations"], metrics={"text_to_visual_r1": 0.4},
        samples=[sample(category="first", score=-2, **near), sample(category="worst", score=-9)],
    )  # fmt: skip
    run.evaluation("few", task="classify", confusion={"classes": ["a", HOSTILE], "counts": [[31, 1000], [0, 7]]})
    run.evaluation("many", task="classify", confusion={"mistakes": [[HOSTILE, "dog", 17]]})
    run.evaluation("perfect", task="classify", confusion={"mistakes": []})
    html = report(run)
    elements = check_self_contained(html)
    assert "<script" not in html
    for words in (
        "First", "Worst", "negated rank of the correct text: -9", "✓ correct", "2 ✓ correct", "1,000", "No mistakes",
        "zero-shot; quoted by a later paper's table",
    ):  # fmt: skip
        assert words in elements.text, words
    assert re.search(r"47\.1%\s*1", elements.text)
    assert re.search(r"predicted as dog: 17", elements.text)
    assert "Best" not in elements.text


def test_without_anything_published_there_is_no_column_for_it(full: Run) -> None:
    assert ">published<" not in report(full)
    full.evaluation("test", recipe="msrvtt_qa", formats=["annotations"])
    assert ">published<" in report(full)


def test_a_folder_of_evaluations_has_a_page_too(tmp_path: Path) -> None:
    folder = tmp_path / "zero_shot"
    write_results(folder, "test", samples=[sample(prediction="an answer")])
    (folder / "broken.json").write_text("{")
    path = write_report(folder)
    assert path == folder / "report.html"
    elements = check_self_contained(path.read_text(encoding="utf-8"))
    for words in ("zero_shot", "after step 100", "an answer", "broken.json is damaged and was skipped"):
        assert words in elements.text
    for words in ("No metrics yet", "Config"):
        assert words not in elements.text


def test_unreadable_files_are_listed_and_the_list_is_bounded(run: Run) -> None:
    run.metrics({"step": 1, "loss": 1}, b"garbage\n", b"more\n", {"step": 2, "loss": None})
    text = Elements(report(run)).text
    assert "metrics.jsonl: 2 damaged lines were skipped" in text
    assert "1 value not finite" in text
    for i in range(50):
        run.evaluation(f"b{i}", task=None)
    text = Elements(report(run)).text
    assert text.count("is damaged and was skipped: 'task' is missing") == 20
    assert "and 31 more" in text


def test_a_run_that_has_just_started_has_a_page(run: Run) -> None:
    text = Elements(report(run)).text
    for message in ("No evaluations yet", "No samples yet", "No metrics yet"):
        assert message in text
    assert "Notes" not in text


@pytest.mark.parametrize(
    "config", [{}, {"steps": "many", "streams": [], "model": 7, "evaluations": None, "name": None}]
)
def test_a_config_of_another_version_still_gives_a_page(run: Run, config: dict[str, Any]) -> None:
    run.config(config)
    run.metrics({"step": 3, "loss": 1.0})
    run.evaluation("a", 3)
    assert re.search(r"3\s+steps", Elements(report(run)).text)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-30, 3e38, -3e38, None])
def test_any_values_can_be_drawn(run: Run, value: float | None) -> None:
    for step in range(5):
        run.metrics({"step": step, "loss": value, "gradient_norm": value, "mfu": value, "eval/a/accuracy": value})
    run.evaluation("a", baselines={"accuracy": value}, metrics={"accuracy": value})
    assert sum(tag == "figure" for tag, _ in check_self_contained(report(run)).elements) == 4


def test_metrics_of_any_number_make_a_bounded_page(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "_MAX_PANELS", 4)
    run.metrics({"step": 1, "loss": 1} | {f"metric_{i}": i for i in range(9)})
    assert sum(tag == "figure" for tag, _ in Elements(report(run)).elements) == 4


def test_the_page_is_replaced_atomically(full: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = report(full)
    full.config(CONFIG | {"name": "another"})

    def fail(*paths: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("data_pipelines.storage.file_system.os.replace", fail)
        with pytest.raises(UserError, match=r"report\.html \(No space left on device\)"):
            write_report(full.path)
    assert (full.path / "report.html").read_text() == before
    after = report(full)
    assert "another" in after
    assert not list(full.path.glob("*.tmp"))


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"holds no run: config\.json is missing; give the work directory of a"):
            write_report(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b'{"name": "a', "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "holds a list and not a run's config"),
    ],
)
def test_a_damaged_config_is_refused_by_its_name(run: Run, content: bytes, message: str) -> None:
    (run.path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.json {message}.*restore it"):
        write_report(run.path)


def test_drawing_imports_no_jax(full: Run, repository: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from mplug2_jax.report import write_report; "
        "write_report(Path(sys.argv[1])); print(sorted({'jax', 'flax', 'torch', 'grain'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, full.path], cwd=repository, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
