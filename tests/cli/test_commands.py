"""The commands on two small runs: what they print, write, and leave unchanged."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.config import VisualConfig
from data_pipelines.examples import Example
from data_pipelines.media import file_media
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.visual import load_visual
from mplug2_jax.cli.common import results_table, sample_lines
from mplug2_jax.evaluation.results import EvaluationResult
from mplug2_jax.evaluation.samples import Sample
from mplug2_jax.training import workdir as workdir_module

from .conftest import Outcome, TrainedRun, mplug2, snapshot


def table_rows(out: str) -> list[list[str]]:
    """Return the rows of the results table, without its header."""
    (table,) = [block for block in out.strip().split("\n\n") if block.startswith("evaluation ")]
    return [line.split() for line in table.splitlines()[2:]]


def test_training_logs_its_progress_and_prints_results_samples_the_report_and_next_steps(trained: TrainedRun) -> None:
    outcome, out = trained.outcome, trained.outcome.out
    assert (outcome.status, outcome.err) == (0, "")
    assert re.match(r"demo: [\d,]+ parameters in text, universal, mlm\nmesh fsdp=8 on cpu\n", outcome.log)
    progress = r"^step (\d)/2  loss \d+\.\d+  [\d.,]+ examples/s .* eta \d:\d\d$"
    assert re.findall(progress, outcome.log, re.MULTILINE) == ["1", "2"]
    assert [(row[:2], row[-1]) for row in table_rows(out)] == [
        (["masked_words", "accuracy"], "11"), (["more_words", "accuracy"], "11")
    ]  # fmt: skip
    assert out.count("    prediction: ") == out.count("    reference:  ") == 2  # one of each evaluation
    report, _, following = out.partition("report: ")[2].partition("\n\n")
    assert report == str(trained.workdir / "report.html")
    *_, evaluate, export = [line.partition("  mplug2 ")[2].split() for line in following.splitlines()]
    assert evaluate == ["eval", "--workdir", str(trained.workdir)]
    assert export == ["convert", "export", str(trained.workdir), "--to", f"exports/{trained.workdir.name}"]
    assert "generate" not in following  # this model has no decoder


def test_samples_of_pictures_come_first_and_name_their_files(tmp_path: Path) -> None:
    def result(name: str, **arrays: np.ndarray) -> EvaluationResult:
        example = Example(key="a", instruction="", text="", answers=("red",), arrays=arrays)
        samples = (Sample(example, "blue", 0.0, "first"), Sample(example, "green", 1.0, "best"))
        return EvaluationResult(name, "mlm", 1, 8, 1.0, {}, {}, samples)

    frames = np.zeros((1, 4, 4, 3), np.uint8)
    lines = sample_lines([result("words"), *(result(f"p{i}", frames=frames) for i in range(4))], tmp_path).splitlines()
    assert lines[:4] == [
        "p0: which words are masked?", f"    image:      {tmp_path / 'p0-0.png'}", "    prediction: blue",
        "    reference:  red",
    ]  # fmt: skip
    assert [line[:2] for line in lines[::4]] == ["p0", "p1", "p2", "p3"]
    clip = sample_lines([result("c", frames=np.zeros((2, 4, 4, 3), np.uint8))], tmp_path).splitlines()
    assert clip[1] == f"    video:      {tmp_path / 'c-0.png'}"


def test_training_leaves_everything_in_the_work_directory(trained: TrainedRun) -> None:
    path = trained.workdir
    assert {entry.name for entry in path.iterdir()} == {
        "checkpoints", "config.json", "evaluations", "events.jsonl", "goodput.jsonl", "hosts.jsonl", "metrics.jsonl",
        "report.html", "tensorboard", "tokenizer",
    }  # fmt: skip
    assert [entry.name for entry in (path / "checkpoints").iterdir()] == ["2"]
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert sorted(name for line in lines for name in line if name.startswith("eval/")) == [
        "eval/masked_words/accuracy", "eval/more_words/accuracy"
    ]  # fmt: skip
    page = (path / "report.html").read_text()
    assert "masked words" in page
    assert "<svg" in page


def test_eval_gives_the_metrics_of_training(trained: TrainedRun, workdir: Path) -> None:
    results = workdir / "evaluations/2/masked_words.json"
    before = json.loads(results.read_text())
    results.unlink()
    done = mplug2("eval", "--workdir", workdir)
    assert (done.status, done.err) == (0, "")
    assert table_rows(done.out) == table_rows(trained.outcome.out)
    after = json.loads(results.read_text())
    assert after | {"seconds": 0} == before | {"seconds": 0}


def test_eval_only_evaluates_what_is_named_and_leaves_the_checkpoints_alone(workdir: Path) -> None:
    # What a run that goes on would be saving just now.
    unfinished = workdir / "checkpoints" / "3.orbax-checkpoint-tmp-1"
    unfinished.mkdir()
    (unfinished / "part").write_text("half")
    before = snapshot(workdir)
    mesh = ("--config.mesh.data=-1", "--config.mesh.fsdp=1")
    done = mplug2("eval", "--workdir", workdir, "--only", "more_words", "--step", 2, *mesh)
    assert done.status == 0
    assert [row[0] for row in table_rows(done.out)] == ["more_words"]
    assert re.search(r"^step 2  more_words \(11 examples, ", done.log, re.MULTILINE)
    after = snapshot(workdir)
    assert {name for name in after if before.get(name) != after[name]} <= {"evaluations/2/more_words.json"}
    assert before.keys() == after.keys()


def test_a_finished_run_is_evaluated_again_and_loses_nothing(trained: TrainedRun, workdir: Path) -> None:
    before = snapshot(workdir)
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=4")
    done = mplug2("train", "--config", trained.recipe, "--workdir", workdir, "--config.log_every=7", *mesh)
    assert (done.status, done.err) == (0, "")
    assert "resuming from step 2\n" in done.log
    assert "all 2 steps are already done\n" in done.log
    assert "loss" not in done.log
    assert table_rows(done.out) == table_rows(trained.outcome.out)
    after = snapshot(workdir)
    assert {name: after[name] for name in after if name.startswith("checkpoints/")} == {
        name: content for name, content in before.items() if name.startswith("checkpoints/")
    }
    assert before.keys() <= after.keys()
    old, new = (files["metrics.jsonl"].decode().splitlines() for files in (before, after))
    assert [json.loads(line) for line in new[: len(old)]] == [json.loads(line) for line in old]
    assert all("eval/" in line for line in new[len(old) :])
    assert json.loads(after["config.json"])["log_every"] == 7


def test_a_run_with_damaged_metrics_goes_on(trained: TrainedRun, workdir: Path) -> None:
    with (workdir / "metrics.jsonl").open("ab") as file:
        file.write(b'5\n{"no": "step"}\n\xff\xfe\n{"step": 2, "lo')
    fewer = "--config.evaluations.more_words.num_samples=0"
    done = mplug2("train", "--config", trained.recipe, "--workdir", workdir, fewer)
    assert (done.status, done.err) == (0, "")
    steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2, 2, 2, 2, 2]


def test_generate_prints_a_line_for_each_file(pictures: Path, media: Path) -> None:
    files = [media / name for name in ("a.png", "a.mp4", "a.gif", "a.txt")]
    options = ("--instruction", "is {text} here?", "--num-beams", 2, "--max-length", 3)
    done = mplug2("generate", "--workdir", pictures, *files, *options)
    assert (done.status, done.err) == (0, "")
    assert [line.partition(": ")[0] for line in done.out.splitlines()] == [str(file) for file in files]


def test_generate_draws_by_its_seed(pictures: Path, media: Path) -> None:
    files = [media / "a.png"] * 3
    words = ("generate", "--workdir", pictures, *files, "--top-p", 0.99, "--num-beams", 1, "--max-length", 4)
    one, again, other = (mplug2(*words, "--temperature", 5, "--seed", seed).out for seed in (1, 1, 100))
    assert one == again != other
    assert len(set(one.splitlines())) == 3  # every file has a seed of its own
    for option in ("--temperature", "--seed"):
        unread = mplug2("generate", "--workdir", pictures, media / "a.png", option, 2)
        assert unread.status == 2
        assert "needs sampling, and this is a search: add --top-p 0.9" in unread.err


@pytest.mark.parametrize(("kind", "suffix", "frames"), [("image", "png", 1), ("video", "mp4", 4)])
def test_data_sample_writes_files_and_says_what_they_show(kind: str, suffix: str, frames: int, tmp_path: Path) -> None:
    done = mplug2("data", "sample", "--kind", kind, "--count", 2, "--out", tmp_path / "new" / "folder")
    assert (done.status, done.err) == (0, "")
    files = [tmp_path / "new" / "folder" / f"{kind}-{i}.{suffix}" for i in range(2)]
    assert sorted((tmp_path / "new" / "folder").iterdir()) == files
    for file, line in zip(files, done.out.splitlines(), strict=True):
        assert re.fullmatch(rf"{re.escape(str(file))}: .+; .+\? .+", line)
        config = VisualConfig(image_size=256, num_frames=frames)
        assert load_visual(file_media(file), config, np.random.default_rng(0)).frames.shape == (frames, 256, 256, 3)


@pytest.mark.parametrize("kind", ["wordpiece", "sentencepiece"])
def test_data_tokenizer_learns_from_files(kind: str, tmp_path: Path) -> None:
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    texts[0].write_text("a small red digit moves\n\nthe blue one stays\n" * 20)
    texts[1].write_text("what happens here\n" * 20)
    out = tmp_path / "deep" / "pieces"
    done = mplug2("data", "tokenizer", *texts, "--kind", kind, "--vocab-size", 70, "--out", out)
    assert (done.status, done.err) == (0, "")
    (file,) = out.iterdir()
    tokenizer = load_tokenizer(out)
    assert done.out == f"{file}: {tokenizer.vocab_size} tokens\n"
    assert 30 < tokenizer.vocab_size <= 70
    assert tokenizer.decode(tokenizer.encode("what small red digit stays")) == "what small red digit stays"


def test_data_tokenizer_learns_from_digitworld_without_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workdir_module, "vocabulary_texts", lambda: iter(["a yellow seven"] * 9))
    done = mplug2("data", "tokenizer", "--vocab-size", 90, "--out", tmp_path / "pieces")
    assert done.status == 0
    tokenizer = load_tokenizer(tmp_path / "pieces")
    assert tokenizer.decode(tokenizer.encode("yellow seven 31 0")) == "yellow seven 31 0"
    assert tokenizer.unk_id not in tokenizer.encode("0 1 2 3 4 5 6 7 8 9")


def test_report_prints_where_the_page_is(workdir: Path) -> None:
    (workdir / "report.html").unlink()
    assert mplug2("report", workdir) == Outcome(0, f"{workdir / 'report.html'}\n", "")
    assert (workdir / "report.html").stat().st_size > 10_000
    folder = workdir / "evaluations" / "2"
    assert mplug2("report", folder) == Outcome(0, f"{folder / 'report.html'}\n", "")


def test_report_compares_two_and_overwrites_nothing(trained: TrainedRun, workdir: Path, tmp_path: Path) -> None:
    words = ("report", trained.workdir, "--against", workdir, "--out", tmp_path / "page.html")
    assert mplug2(*words) == Outcome(0, f"{tmp_path / 'page.html'}\n", "")
    assert "the same score on every example" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert mplug2(*words) == Outcome(2, "", f"mplug2: error: {tmp_path / 'page.html'} exists; choose another --out\n")
    alone = mplug2("report", workdir, "--out", tmp_path / "other.html")
    assert alone == Outcome(
        2, "", "mplug2: error: --out needs --against: remove it, or name a folder to compare with\n"
    )


def test_the_results_table_has_published_results_if_there_are_any() -> None:
    def result(recipe: str, *formats: str) -> EvaluationResult:
        return EvaluationResult(
            "test", "answer", 1, 8, 1.0, {"accuracy": 0.5}, {"accuracy": 0.25}, (),
            confidence_intervals={"accuracy": (0.4, 0.6)}, recipe=recipe, formats=formats,
        )  # fmt: skip

    header, _, first, second = results_table([result("msrvtt_qa", "annotations"), result("demo")]).splitlines()
    assert header.endswith("examples  published")
    assert first.endswith("8      48.0%")
    assert second.endswith("8")
    assert "published" not in results_table([result("demo"), result("released_videoqa", "digitworld")])
