"""Lists of answers: read, made ids of, refused in a sentence; and an evaluation that is held to one."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines.examples import ExampleConfig, InstructionConfig
from data_pipelines.loader import DataConfig
from data_pipelines.sources.config import SourceConfig
from data_pipelines.visual import VisualConfig
from mplug2_jax.errors import UserError
from mplug2_jax.evaluation.answers import read_answers
from mplug2_jax.evaluation.loop import Evaluation, EvaluationConfig
from mplug2_jax.generation.beam import SearchConfig
from mplug2_jax.generation.constrained import NOTHING
from mplug2_jax.model.mplug2 import define
from mplug2_jax.parallel.mesh import MeshConfig, make_mesh
from tests.evaluation.test_loop import CONTEXT, MODEL, QUESTIONS, TOKENIZER

SEARCH = SearchConfig(max_length=5)
ASK = ExampleConfig(
    instructions={"question": InstructionConfig(templates=("{question}",))}, instruction_length=24, target_length=4
)


def written(folder: Path, content: object) -> Path:
    path = folder / "answers.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_answers_are_ids_from_after_the_begin_token_to_the_end_each_once(tmp_path: Path) -> None:
    path = written(tmp_path, ["ab", "c d e", "ab", "a b"])
    table = read_answers(path, "config.x", ASK, TOKENIZER, SEARCH)
    assert table.shape == (3, 5)  # longer than targets are
    for row, answer in zip(table, ("ab", "c d e", "a b"), strict=True):
        ids = row[row != NOTHING].tolist()
        assert [TOKENIZER.cls_id, *ids] == TOKENIZER.encode(answer)
        assert (row[len(ids) :] == NOTHING).all()


@pytest.mark.parametrize(
    ("content", "search", "sentence"),
    [
        (None, SEARCH, "cannot be read: No such file"),
        ("[1,", SEARCH, "is not JSON"),
        ("[" * 100_000, SEARCH, "is not JSON"),
        ({"yes": 1}, SEARCH, "should be a list of answers"),
        ([], SEARCH, "not an empty one"),
        (["yes", 3], SEARCH, "should be a list of answers"),
        (["yes", " "], SEARCH, "should be a list of answers"),
        (
            ["a", "a b c d e"],
            SEARCH,
            "'a b c d e' has 6 tokens with its end, and config.tasks.search.max_length=5;",
        ),
        (["a"], SearchConfig(extend_finished=True), "needs a plain search, not config.tasks.search.extend_finished"),
        (["a"], SearchConfig(top_p=0.5), "needs a plain search, not config.tasks.search.top_p"),
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, content: object, search: SearchConfig, sentence: str) -> None:
    path = tmp_path / "none.json" if content is None else written(tmp_path, content)
    with pytest.raises(UserError) as error:
        read_answers(path, "config.evaluations.held.answers", ASK, TOKENIZER, search)
    assert str(error.value).startswith(f"config.evaluations.held.answers={path}")
    assert sentence in str(error.value)


def asked(task: str, answers: Path) -> Evaluation:
    data = DataConfig(
        sources={"digits": SourceConfig(kind="image", split="heldout", size=6)}, visual=VisualConfig(),
        examples=QUESTIONS, batch_size=4,
    )  # fmt: skip
    config = EvaluationConfig(task=task, data=data, answers=str(answers))
    definition = define(MODEL, ("vision", "text", "universal", "fusion", "decoder"))
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    return Evaluation("held", config, definition, CONTEXT, TOKENIZER, one, seed=0)


def test_an_evaluation_says_nothing_that_is_not_listed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = define(MODEL, ("vision", "text", "universal", "fusion", "decoder")).shapes
    params = jax.tree.map(lambda s: (rng.normal(size=s.shape) * 0.3).astype(np.float32), shapes)
    result = asked("answer", written(tmp_path, ["red", "two", "left"])).run(params, 0)
    assert len(result.said) == 6
    assert {row["said"] for row in result.said} <= {"red", "two", "left"}


def test_a_list_of_answers_is_for_questions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"held\.answers is for the task 'answer', not for 'caption'"):
        asked("caption", written(tmp_path, ["red"]))
