"""What is right is scored as right, whatever the tokeniser does to it; and what cannot be judged ends no evaluation."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from data_pipelines.config import DataConfig, ExampleConfig, InstructionConfig, SourceConfig, VisualConfig
from data_pipelines.tokenizers import SPECIAL_TOKENS, WordPieceTokenizer, round_trip, train_sentencepiece
from mplug2_jax.evaluation import loop
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.evaluation.loop import Evaluation, EvaluationResult
from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.tasks.base import TaskContext
from mplug2_jax.tasks.config import TaskSettings
from tests.evaluation.test_loop import LETTERS, MODEL

TEXTS = (
    "t-shirt", "o'clock", "3:30", "50%", "$5", "a/c", "Café", "U.S.A.", "don't", "black & white", "(none)", "x - y",
    "rock 'n' roll", "c++", "1,000", "yes", "¿qué?",
)  # fmt: skip
MARKS = "-':%$/.&(),+?¿"
PIECES = [*SPECIAL_TOKENS, *MARKS, *LETTERS, *"0123456789", *(f"##{c}" for c in f"{LETTERS}0123456789")]
WORDS = WordPieceTokenizer(PIECES)
ASKED = ExampleConfig(
    instructions={"question": InstructionConfig(templates=("{question}",))}, instruction_length=8, target_length=40
)


def perfect(
    monkeypatch: pytest.MonkeyPatch, folder: Path, task: str, rows: Any, examples: ExampleConfig = ASKED, **data: Any
) -> EvaluationResult:
    """The evaluation of a model that says the target of every example."""
    (folder / "set.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    source = SourceConfig(format="annotations", kind="text", path=str(folder / "set.jsonl"))
    read = DataConfig(sources={"set": source}, visual=VisualConfig(), examples=examples, batch_size=4, **data)
    definition = define_model(
        dataclasses.replace(MODEL, vocab_size=WORDS.vocab_size, max_positions=64), ("text", "universal", "decoder")
    )
    tokens = SpecialTokens(begin=WORDS.cls_id, end=WORDS.sep_id, mask=WORDS.mask_id)
    context = TaskContext(settings=TaskSettings(), tokens=tokens)
    monkeypatch.setattr(loop, "jit_predict", lambda *_: lambda params, batch: {"ids": batch["target"]})
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = EvaluationConfig(task=task, data=read)
    return Evaluation("held", config, definition, context, WORDS, mesh, seed=0).run({}, 0)


@pytest.mark.parametrize("task", ["answer", "ilm", "vqa", "summarize"])
def test_a_perfect_model_is_right_whatever_the_pieces_do_to_spaces_case_and_accents(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task: str
) -> None:
    given = [[text] * 10 if task == "vqa" else [text] for text in TEXTS if task != "summarize" or text != "¿qué?"]
    rows = [{"id": i, "question": "what?", "answers": answers} for i, answers in enumerate(given)]
    result = perfect(monkeypatch, tmp_path, task, rows)
    figures = {"summarize": ("rouge_1", 100), "vqa": ("vqa_accuracy", 1)}
    name, full = figures.get(task, ("accuracy", 1))
    assert result.metrics[name] == full
    assert [row["reference"] for row in result.predictions] == [
        answers[0] for answers in given
    ]  # shown as they were written
    assert not result.warnings


def test_the_released_form_compares_to_the_letter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"id": i, "question": "what?", "answer": text} for i, text in enumerate(("yes", "t-shirt"))]
    released = dataclasses.replace(ASKED, tokenization="released")
    assert perfect(monkeypatch, tmp_path, "answer", rows, released).metrics == {"accuracy": 0.5}


def test_what_no_vocabulary_knows_is_never_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"id": i, "question": "what?", "answer": text} for i, text in enumerate(("yes", "日本", "東京"))]
    assert perfect(monkeypatch, tmp_path, "answer", rows).metrics["accuracy"] == pytest.approx(1 / 3)


def test_questions_with_too_few_answers_are_left_out_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = (["yes"] * 10, ["no"] * 3, ["yes"], ["yes"] * 2 + [""] * 3 + ["no"] * 5)
    rows = [{"id": f"q{i}", "question": "is it?", "answers": answers} for i, answers in enumerate(given)]
    result = perfect(monkeypatch, tmp_path, "vqa", rows, max_bad_fraction=0.5)
    assert result.metrics == {"vqa_accuracy": 1.0}
    assert (result.num_examples, len(result.skipped)) == (2, 2)


def test_a_summary_without_a_word_weighs_nothing_and_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"id": i, "question": "in short?", "answer": text} for i, text in enumerate(("it rains", "?", "日本"))]
    result = perfect(monkeypatch, tmp_path, "summarize", rows)
    assert result.metrics["rouge_1"] == 100
    assert result.warnings[0].startswith("2 of 3 reference summaries have no word and have weight 0, first ")


@pytest.mark.parametrize("tokenizer", [WORDS, train_sentencepiece(["a t-shirt at 3:30, don't"] * 20, 40)])
@pytest.mark.parametrize("text", [*TEXTS, "", "日本 t-shirt"])
def test_saying_what_was_said_changes_nothing(tokenizer: Any, text: str) -> None:
    once = round_trip(tokenizer, text)
    assert "\ufffd" in once or round_trip(tokenizer, once) == once
    assert once.replace("\ufffd", "[UNK]") == tokenizer.decode(tokenizer.encode(text))
