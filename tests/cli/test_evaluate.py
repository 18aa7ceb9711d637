"""``mplug2 eval`` of a checkpoint by another recipe, and of a run in progress."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.config import DataConfig, ExampleConfig, InstructionConfig, SourceConfig
from data_pipelines.media import write_image
from mplug2_jax.evaluation.config import EvaluationConfig
from tests.runs import QUESTION, SMALL, recipe_file, small_run

from .conftest import Outcome, TrainedRun, mplug2, snapshot
from .test_bad_input import error_of


def results(folder: Path) -> dict[str, bytes]:
    """Return the result files, without their duration and their report."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".html"}
    return {
        name: json.dumps(json.loads(content) | {"seconds": 0}).encode() if name.endswith(".json") else content
        for name, content in found.items()
    }


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/2"])
def test_a_checkpoint_by_its_own_recipe_gives_what_training_gave(
    where: str, trained: TrainedRun, tmp_path: Path
) -> None:
    words = ("--checkpoint", trained.workdir / where, "--out", tmp_path / "out")
    done = mplug2("eval", "--task" if where else "--config", trained.recipe, *words)  # --task is the old name
    assert (done.status, done.err) == (0, "")
    assert "masked_words" in done.out
    assert done.out.endswith(f"report: {tmp_path / 'out' / 'report.html'}\n")
    assert "masked words" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert results(tmp_path / "out") == results(trained.workdir / "evaluations" / "2")


def test_results_go_beside_the_run_and_sizes_are_the_checkpoint_s(
    trained: TrainedRun, workdir: Path, recipes: Path
) -> None:
    shutil.rmtree(workdir / "evaluations")
    (workdir / "report.html").unlink()
    wrong = (recipes / "text.py").read_text().replace("--config.model.width=32", "--config.model.width=64")
    assert "width=64" in wrong
    (recipes / "wide.py").write_text(wrong)
    done = mplug2("eval", "--config", recipes / "wide.py", "--checkpoint", workdir, "--only", "masked_words")
    assert (done.status, done.err) == (0, "")
    assert done.out.endswith(f"report: {workdir / 'report.html'}\n")
    assert (workdir / "report.html").stat().st_size > 10_000  # the run's own
    ours, theirs = results(workdir / "evaluations" / "2"), results(trained.workdir / "evaluations" / "2")
    assert ours == {name: theirs[name] for name in ("masked_words.json", "masked_words.jsonl")}


def test_a_checkpoint_without_a_run_needs_a_folder_and_a_tokenizer(
    trained: TrainedRun, workdir: Path, vocabulary: Path
) -> None:
    (workdir / "config.json").unlink()
    words = ("eval", "--config", trained.recipe, "--checkpoint", workdir)
    assert error_of(mplug2(*words)) == f"{workdir} is not the work directory of a run: give --out DIR for the results"
    shutil.rmtree(workdir / "tokenizer")
    words = (*words, "--out", workdir / "out")
    assert f"{workdir} has no tokenizer" in error_of(mplug2(*words, "--config.tokenizer.path="))
    assert mplug2(*words, f"--config.tokenizer.path={vocabulary}").status == 0
    assert results(workdir / "out") == results(trained.workdir / "evaluations" / "2")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--config", "finetune:videoqa,tiny"),
         "task 'answer' needs the parts vision, temporal, fusion, decoder, which the model in {} lacks (it has text, "
         "universal, mlm); select other evaluations with --only"),
        (("--config", "{recipe}", "--only", "maskd_words"),
         "--only maskd_words is not an evaluation of this run: did you mean 'masked_words'?"),
        (("--config", "{recipe}", "--config.evaluations.more_words.data.sources.digits.max_records=0"),
         "config.evaluations.more_words.data: the source digitworld (text, heldout) is empty"),
        (("--config", "{recipe}", "--config.model.width=64"), " is of another size: "),
        (("--config", "{recipe}", "--config.evaluations.more_words.data.examples.text_length=90"),
         "text_length=90 exceeds config.model.max_positions=64"),
        ((), "--config is missing"),
        (("--config", "{recipe}", "--follow"), "--follow needs --workdir: add that, or remove this option"),
        (("--config", "{recipe}", "--step", "2"), "--step needs --workdir: add that, or remove this option"),
        (("--config", "{recipe}", "--workdir", "runs/x"), "--config RECIPE and --checkpoint PATH; give one"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    words: tuple[str, ...], expected: str, trained: TrainedRun, tmp_path: Path
) -> None:
    words = tuple(word.format(recipe=trained.recipe) for word in words)
    done = mplug2("eval", *words, "--checkpoint", trained.workdir, "--out", tmp_path / "out")
    assert expected.format(trained.workdir) in error_of(done)
    assert not (tmp_path / "out").exists()


def test_pictures_of_another_size_are_refused(contrastive_run: Path, tmp_path: Path) -> None:
    words = ("--checkpoint", contrastive_run, "--out", tmp_path / "out")
    done = mplug2("eval", "--config", "finetune:videoqa,tiny", *words)
    assert error_of(done) == (
        f"config.evaluations.video.data.visual.image_size=32, but the model in {contrastive_run} has image_size=16: "
        "set --config.evaluations.video.data.visual.image_size=16"
    )


def test_only_the_parts_that_are_needed_are_read(contrastive_run: Path, tmp_path: Path) -> None:
    """Question answering does not read the contrastive head, which the checkpoint has."""
    done = mplug2(
        "eval", "--config", "finetune:videoqa,tiny", "--checkpoint", contrastive_run, "--out", tmp_path / "out",
        "--config.evaluations.video.data.visual.image_size=16",
        "--config.evaluations.video.data.sources.clips.max_records=8",
        "--config.mesh.fsdp=8", "--config.tasks.search.num_beams=1", "--config.tasks.search.max_length=3",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert len((tmp_path / "out" / "video.jsonl").read_text().splitlines()) == 8


def test_a_finished_run_is_followed_to_its_end_and_not_twice(trained: TrainedRun, workdir: Path) -> None:
    shutil.rmtree(workdir / "evaluations")
    before = snapshot(workdir)
    done = mplug2("eval", "--workdir", workdir, "--follow", "--only", "masked_words")
    assert (done.status, done.err) == (0, "")
    assert "step 2  masked_words (11 examples, " in done.log
    theirs = results(trained.workdir / "evaluations" / "2")
    assert results(workdir / "evaluations" / "2") == {
        name: theirs[name] for name in ("masked_words.json", "masked_words.jsonl")
    }
    (line,) = (workdir / "metrics-eval.jsonl").read_text().splitlines()
    metrics = json.loads(theirs["masked_words.json"])["metrics"]
    assert json.loads(line) == {"step": 2, "eval/masked_words/accuracy": metrics["accuracy"]}
    changed = {name for name, content in snapshot(workdir).items() if before.get(name) != content}
    assert {name.split("/")[0] for name in changed} == {"evaluations", "metrics-eval.jsonl", "report.html"}

    again = mplug2("eval", "--workdir", workdir, "--follow", "--only", "masked_words")
    assert again == Outcome(0, f"report: {workdir / 'report.html'}\n", "")
    assert "step 2: already evaluated\n" in again.log
    more = mplug2("eval", "--workdir", workdir, "--follow")  # as after a kill between two evaluations
    assert [line.split(" (")[0] for line in more.log.splitlines() if "examples" in line] == ["step 2  more_words"]


def test_a_damaged_checkpoint_is_skipped(workdir: Path) -> None:
    shutil.rmtree(workdir / "evaluations")
    (workdir / "checkpoints" / "2" / "meta" / "metadata").write_text("{")
    done = mplug2("eval", "--workdir", workdir, "--follow")
    assert done.status == 1
    path = workdir / "checkpoints" / "2"
    assert f"] step 2: skipped, checkpoint {path} is incomplete: meta/metadata" in done.err
    assert not (workdir / "evaluations").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--follow", "--until-step", "3"), "--until-step=3 is not a step of this run; expected 1 to 2"),
        (("--follow", "--poll", "0"), "--poll=0 must be at least 1"),
        (("--follow", "--out", "x"), "--out is for one checkpoint, but --follow evaluates all: remove it"),
        (("--poll", "3"), "--poll needs --follow: add that, or remove this option"),
    ],
)
def test_options_without_meaning_are_errors(words: tuple[str, ...], expected: str, trained: TrainedRun) -> None:
    assert error_of(mplug2("eval", "--workdir", trained.workdir, *words)) == expected


# Evaluations on bad files


QUESTIONS = ExampleConfig(instructions=QUESTION, instruction_length=12, target_length=6)
CAPTIONS = ExampleConfig(instructions={"caption": InstructionConfig(templates=("",))}, target_length=6)
LABELS = ExampleConfig(instructions={"label": InstructionConfig(templates=("",))}, classes=("a", "b"))


@dataclasses.dataclass(frozen=True)
class Bad:
    """A callable that evaluates a model on annotations of three images."""

    folder: Path
    checkpoint: Path

    def __call__(self, rows: object, task: str, examples: ExampleConfig, *overrides: str) -> Outcome:
        for i in range(3):
            write_image(self.folder / f"{i}.png", np.full((16, 16, 3), 99 * i, np.uint8))
        (self.folder / "set.json").write_text(json.dumps(rows))
        path, words = str(self.folder / "set.json"), [f"--config.evaluations.held.{each}" for each in overrides]
        source = SourceConfig(format="annotations", path=path, media=str(self.folder))
        data = DataConfig(sources={"set": source}, visual=SMALL, examples=examples, batch_size=8, max_bad_fraction=0.5)
        run = small_run(evaluations={"held": EvaluationConfig(task=task, data=data)})
        return mplug2(
            "eval", "--config", recipe_file(run, self.folder / "recipe.py"), "--checkpoint", self.checkpoint, "--out",
            self.folder / "out", "--config.mesh.fsdp=8", *words,
        )  # fmt: skip


@pytest.fixture
def bad(tmp_path: Path, contrastive_run: Path) -> Bad:
    return Bad(tmp_path, contrastive_run)


def questions(*answers: str) -> list[dict[str, str]]:
    return [{"image": f"{i}.png", "question": "what is it?", "answer": answer} for i, answer in enumerate(answers)]


@pytest.mark.parametrize("num_ranked", [0, 2])
def test_references_outside_the_list_of_answers_are_a_warning(num_ranked: int, bad: Bad) -> None:
    (bad.folder / "answers.json").write_text('["red", "two"]')
    words = f"answers_file={bad.folder / 'answers.json'}", f"num_ranked={num_ranked}"
    done = bad(questions("red", "blue", "green"), "answer", QUESTIONS, *words)
    warning = "2 of 3 examples have no reference in the list of answers, first 'blue' of set/2"
    assert done.status == 0
    assert done.err.endswith(f"] evaluation held: {warning}\n")
    assert json.loads((bad.folder / "out" / "held.json").read_text())["warnings"] == [warning]
    lines = (bad.folder / "out" / "held.jsonl").read_text().splitlines()
    assert {json.loads(line)["prediction"] for line in lines} <= {"red", "two"}


def test_a_complete_list_of_answers_is_no_warning(bad: Bad) -> None:
    (bad.folder / "answers.json").write_text('["red", "a blue"]')
    rows = [{"image": "0.png", "question": "what?", "answers": ["Blue", "blue", "blue", "red"]}]
    done = bad(rows, "vqa", QUESTIONS, f"answers_file={bad.folder / 'answers.json'}")  # equal after normalization
    assert (done.status, done.err) == (0, "")


def test_images_without_captions_are_skipped_and_missed_in_the_submission(bad: Bad) -> None:
    rows = [{"image": "0.png", "captions": ["a digit"]}, {"image": "1.png", "captions": []}]
    done = bad(rows, "caption", CAPTIONS)
    assert done.status == 0
    missed, skipped = done.err.splitlines()
    submission = bad.folder / "out" / "submissions" / "held.json"
    assert missed.endswith(f"] {submission} misses 1 skipped record, first record 1")
    assert f"] evaluation held: skipped 1 record, first {bad.folder}/set.json row 2: " in skipped
    assert json.loads((bad.folder / "out" / "held.json").read_text())["num_examples"] == 1


PICTURE = {"filename": "0.png", "split": "test", "imgid": 0, "cocoid": 0, "sentences": [{"raw": "a digit"}]}

KARPATHY = "data.sources.set.format=karpathy", "data.sources.set.split=tset"


@pytest.mark.parametrize(
    ("rows", "task", "examples", "words", "expected"),
    [
        ([], "caption", CAPTIONS, (), "set.json, expected at least 1"),
        (["{"], "caption", CAPTIONS, (), "set.json row 1"),
        ({"images": [PICTURE]}, "caption", CAPTIONS, KARPATHY, "split 'tset' is not in the file; its splits are test"),
        ([{"image": "0.png", "captions": []}], "caption", CAPTIONS, (), "row 1: captions is empty"),
        ([{"image": "0.png", "question": "what?"}], "answer", QUESTIONS, (), "row 1 has no answers or answer"),
        (questions("red"), "caption", CAPTIONS, (), "has nothing for the instructions caption"),
        (questions("red"), "answer", QUESTIONS, ("data.visual.num_clips=2",),
         "visual.num_clips=2 needs videos, found sources of kind image"),
        (questions("red"), "answer", QUESTIONS, ("data.visual.num_crops=3",),
         "num_clips=1 and num_crops=3 are views whose probabilities are averaged"),
        ([{"image": "0.png", "label": "a"}], "classify", LABELS, (),
         "task 'classify' needs the parts classifier, which the model in "),
    ],
)  # fmt: skip
def test_files_that_cannot_be_evaluated_are_refused(
    rows: object, task: str, examples: ExampleConfig, words: tuple[str, ...], expected: str, bad: Bad
) -> None:
    sentence = error_of(bad(rows, task, examples, *words))
    assert expected in sentence
    assert "0 replacements" not in sentence
    assert not (bad.folder / "out").exists()
