"""References score as correct, however the tokenizer encodes them; unscorable examples do not end an evaluation."""

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
from mplug2_jax.evaluation.loop import Evaluation
from mplug2_jax.evaluation.results import EvaluationResult
from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.tasks.base import TaskContext
from mplug2_jax.tasks.config import TasksConfig
from tests.evaluation.test_loop import LETTERS, MODEL

TEXTS = (
    "t-shirt", "o'clock", "3:30", "50%", "$5", "a/c", "Café", "U.S.A.", "don't", "black & white", "(none)", "x - y",
    "rock 'n' roll", "c++", "1,000", "yes", "¿qué?",
)  # fmt: skip
MARKS = "-':%$/.&(),+?¿"
PIECES = [*SPECIAL_TOKENS, *MARKS, *LETTERS, *"0123456789", *(f"##{c}" for c in f"{LETTERS}0123456789")]
WORDS = WordPieceTokenizer(PIECES)
QUESTION = ExampleConfig(
    instructions={"question": InstructionConfig(templates=("{question}",))}, instruction_length=8, target_length=40
)


def evaluate_perfect_model(
    monkeypatch: pytest.MonkeyPatch, folder: Path, task: str, rows: Any, examples: ExampleConfig = QUESTION, **data: Any
) -> EvaluationResult:
    """Evaluate a model that predicts the target of every example."""
    (folder / "set.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    source = SourceConfig(format="annotations", kind="text", path=str(folder / "set.jsonl"))
    read = DataConfig(sources={"set": source}, visual=VisualConfig(), examples=examples, batch_size=4, **data)
    model_def = define_model(
        dataclasses.replace(MODEL, vocab_size=WORDS.vocab_size, max_positions=64), ("text", "universal", "decoder")
    )
    tokens = SpecialTokens(begin=WORDS.cls_id, end=WORDS.sep_id, mask=WORDS.mask_id)
    context = TaskContext(config=TasksConfig(), tokens=tokens)
    monkeypatch.setattr(loop, "jit_predict", lambda *_: lambda params, batch: {"ids": batch["target"]})
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    config = EvaluationConfig(task=task, data=read)
    return Evaluation("held", config, model_def, context, WORDS, mesh, seed=0).run({}, 0)


@pytest.mark.parametrize("task", ["answer", "ilm", "vqa", "summarize"])
def test_a_perfect_model_scores_full_whatever_the_tokenizer_does_to_spaces_case_and_accents(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task: str
) -> None:
    given = [[text] * 10 if task == "vqa" else [text] for text in TEXTS if task != "summarize" or text != "¿qué?"]
    rows = [{"id": i, "question": "what?", "answers": answers} for i, answers in enumerate(given)]
    result = evaluate_perfect_model(monkeypatch, tmp_path, task, rows)
    full_scores = {"summarize": ("rouge_1", 100), "vqa": ("vqa_accuracy", 1)}
    name, full_score = full_scores.get(task, ("accuracy", 1))
    assert result.metrics[name] == full_score
    # References are shown as they were written.
    assert [row["reference"] for row in result.predictions] == [answers[0] for answers in given]
    assert not result.warnings


def test_the_released_tokenization_compares_raw_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"id": i, "question": "what?", "answer": text} for i, text in enumerate(("yes", "t-shirt"))]
    released = dataclasses.replace(QUESTION, tokenization="released")
    assert evaluate_perfect_model(monkeypatch, tmp_path, "answer", rows, released).metrics == {"accuracy": 0.5}


def test_a_reference_outside_the_vocabulary_is_never_matched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"id": i, "question": "what?", "answer": text} for i, text in enumerate(("yes", "日本", "東京"))]
    assert evaluate_perfect_model(monkeypatch, tmp_path, "answer", rows).metrics["accuracy"] == pytest.approx(1 / 3)


def test_questions_with_too_few_answers_are_skipped_and_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = (["yes"] * 10, ["no"] * 3, ["yes"], ["yes"] * 2 + [""] * 3 + ["no"] * 5)
    rows = [{"id": f"q{i}", "question": "is it?", "answers": answers} for i, answers in enumerate(given)]
    result = evaluate_perfect_model(monkeypatch, tmp_path, "vqa", rows, max_bad_fraction=0.5)
    assert result.metrics == {"vqa_accuracy": 1.0}
    assert (result.num_examples, len(result.skipped)) == (2, 2)


def test_a_reference_summary_without_a_word_has_weight_0_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [{"id": i, "question": "in short?", "answer": text} for i, text in enumerate(("it rains", "?", "日本"))]
    result = evaluate_perfect_model(monkeypatch, tmp_path, "summarize", rows)
    assert result.metrics["rouge_1"] == 100
    assert result.warnings[0].startswith("2 of 3 reference summaries have no word and have weight 0, first ")


@pytest.mark.parametrize("tokenizer", [WORDS, train_sentencepiece(["a t-shirt at 3:30, don't"] * 20, 40)])
@pytest.mark.parametrize("text", [*TEXTS, "", "日本 t-shirt"])
def test_a_second_round_trip_changes_nothing(tokenizer: Any, text: str) -> None:
    once = round_trip(tokenizer, text)
    assert "\ufffd" in once or round_trip(tokenizer, once) == once
    assert once.replace("\ufffd", "[UNK]") == tokenizer.decode(tokenizer.encode(text))
