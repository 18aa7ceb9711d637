"""Lists of answers: reading, encoding, errors, and evaluations that are constrained to one."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from data_pipelines.config import DataConfig, ExampleConfig, InstructionConfig, SourceConfig, VisualConfig
from mplug2_jax.errors import UserError
from mplug2_jax.evaluation import loop
from mplug2_jax.evaluation.answers import read_answers
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.evaluation.loop import Evaluation
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.generation.constrained import ANSWER_PAD
from mplug2_jax.model.mplug2 import Params, define_model
from mplug2_jax.objectives.forward import DeviceBatch, ForwardPass
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.tasks.base import TaskContext
from tests.evaluation.test_loop import CONTEXT, MODEL, QUESTIONS, TOKENIZER, random_params

SEARCH = SearchConfig(max_length=5)
ASK = ExampleConfig(
    instructions={"question": InstructionConfig(templates=("{question}",))}, instruction_length=24, target_length=4
)


def write(folder: Path, content: object) -> Path:
    path = folder / "answers.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_answers_are_ids_from_after_the_begin_token_to_the_end_each_once(tmp_path: Path) -> None:
    path = write(tmp_path, ["ab", "c d e", "ab", "a b"])
    table = read_answers(path, "config.x", ASK, TOKENIZER, SEARCH, 32)
    assert table.shape == (3, 5)  # longer than targets are
    for row, answer in zip(table, ("ab", "c d e", "a b"), strict=True):
        ids = row[row != ANSWER_PAD].tolist()
        assert [TOKENIZER.cls_id, *ids] == TOKENIZER.encode(answer)
        assert (row[len(ids) :] == ANSWER_PAD).all()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"b": 1, "a": 0}, ["a", "b"]),  # in the order of the numbers
        (["a", 3], ["a", "3"]),
        (["a", "", "b"], ["a", "", "b"]),  # as in the common list of 3,129
    ],
)
def test_common_formats_of_lists_are_read(tmp_path: Path, content: object, expected: list[str]) -> None:
    table = read_answers(write(tmp_path, content), "config.x", ASK, TOKENIZER, SEARCH, 32)
    assert [[TOKENIZER.cls_id, *row[row != ANSWER_PAD].tolist()] for row in table] == list(
        map(TOKENIZER.encode, expected)
    )


@pytest.mark.parametrize(
    ("content", "search", "sentence"),
    [
        (
            ["a", "a b c d e f"],
            None,
            "has 8 tokens with its begin and end tokens, but config.model.max_positions=7; remove the answer",
        ),
        (None, SEARCH, "cannot be read: No such file"),
        ("[1,", SEARCH, "is not JSON"),
        ("[" * 100_000, SEARCH, "is not JSON"),
        ({"yes": "1"}, SEARCH, "is empty or not a list"),
        ({"yes": True}, SEARCH, "is empty or not a list"),
        ([], SEARCH, "is empty or not a list; expected answers, as"),
        (["yes", None], SEARCH, "entry 1 is None; expected answers"),
        (["yes", ["no"]], SEARCH, "entry 1 is ['no']; expected"),
        (["yes", True], SEARCH, "entry 1 is True; expected"),
        ('["yes", NaN]', SEARCH, "entry 1 is nan; expected"),
        ('["yes", "\\ud83d"]', SEARCH, r"'\ud83d' is not Unicode text"),
        (["yes", "caf\udce9"], SEARCH, r"'caf\udce9' is not Unicode text: unpaired surrogate"),
        (
            ["a", "a b c d e"],
            SEARCH,
            "'a b c d e' has 6 tokens with its end token, but config.tasks.search.max_length=5;",
        ),
        (["a"], SearchConfig(extend_finished=True), "cannot be combined with config.tasks.search.extend_finished"),
        (["a"], SearchConfig(top_p=0.5), "cannot be combined with config.tasks.search.top_p"),
    ],
)
def test_an_invalid_list_is_an_error(
    tmp_path: Path, content: object, search: SearchConfig | None, sentence: str
) -> None:
    path = tmp_path / "none.json" if content is None else write(tmp_path, content)
    with pytest.raises(UserError) as error:
        read_answers(path, "config.evaluations.held.answers_file", ASK, TOKENIZER, search, 7)
    assert str(error.value).startswith(f"config.evaluations.held.answers_file={path}")
    assert sentence in str(error.value)


DEFINITION = define_model(MODEL, ("vision", "text", "universal", "fusion", "decoder"))
ANSWERS = ["red", "two", "left", "le", "r e d", "twos", "blue", "no"]


def make_evaluation(
    task: str, answers: Path | str, *, num_ranked: int = 0, mesh: Mesh | None = None, batch_size: int = 4,
    examples: ExampleConfig = QUESTIONS,
) -> Evaluation:  # fmt: skip
    data = DataConfig(
        sources={"digits": SourceConfig(kind="image", split="heldout", max_records=6)}, visual=VisualConfig(),
        examples=examples, batch_size=batch_size,
    )  # fmt: skip
    config = EvaluationConfig(task=task, data=data, answers_file=str(answers), num_ranked=num_ranked)
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    return Evaluation("held", config, DEFINITION, CONTEXT, TOKENIZER, mesh or one, seed=0)


@pytest.fixture(scope="module")
def params() -> Params:
    return random_params(DEFINITION)


def test_an_evaluation_predicts_only_answers_of_the_list(tmp_path: Path, params: Params) -> None:
    result = make_evaluation("answer", write(tmp_path, ["red", "two", "left"])).run(params, 0)
    assert len(result.predictions) == 6
    assert {row["prediction"] for row in result.predictions} <= {"red", "two", "left"}


def test_a_list_of_answers_is_for_questions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"held\.answers_file is for the tasks 'answer' and 'vqa', not for 'caption'"):
        make_evaluation("caption", write(tmp_path, ["red"]))
    with pytest.raises(UserError, match=r"held\.num_ranked=3 needs a list of answers: set .*\.held\.answers_file"):
        make_evaluation("answer", "", num_ranked=3)
    with pytest.raises(UserError, match=r"held\.num_ranked=-1 must be at least 0"):
        make_evaluation("answer", write(tmp_path, ["red"]), num_ranked=-1)


def log_likelihoods(params: Params) -> np.ndarray:
    """Return the log-likelihoods of each answer's tokens [examples, answers, tokens], padded with 0."""
    (batch,) = make_evaluation("answer", "", batch_size=6)._dataset.batches()
    longest = max(len(TOKENIZER.encode(answer)) for answer in ANSWERS) - 1

    def token_log_likelihoods(params: Params, arrays: DeviceBatch, ids: jax.Array) -> jax.Array:
        model = DEFINITION.bind(params)
        memory, mask = ForwardPass(model, arrays).instruction_memory
        rows = jnp.tile(ids, (len(memory), 1))  # rows after the six are padding
        logits = model.decoder(rows, None, memory, mask)[:6, :-1]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:6, 1:, None], axis=-1)[..., 0]

    log_probs = np.zeros((6, len(ANSWERS), longest))
    for a, answer in enumerate(ANSWERS):
        ids = jnp.asarray(TOKENIZER.encode(answer))
        log_probs[:, a, : len(ids) - 1] = jax.jit(token_log_likelihoods)(params, batch.arrays, ids)
    return log_probs


@pytest.mark.slow
def test_the_likeliest_answer_among_those_with_the_likeliest_first_token_wins_on_any_mesh(
    tmp_path: Path, params: Params
) -> None:
    path, log_probs = write(tmp_path, ANSWERS), log_likelihoods(params)
    meshes = [None, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))]
    expected = {}
    for num_ranked in (1, 3, 99):
        candidates = np.argsort(-log_probs[:, :, 0], axis=1, kind="stable")[:, :num_ranked]
        totals = np.take_along_axis(log_probs.sum(2), candidates, 1)
        best = np.take_along_axis(candidates, totals.argmax(1)[:, None], 1)[:, 0]
        expected[num_ranked] = [ANSWERS[a] for a in best]
        for mesh in meshes:
            result = make_evaluation("answer", path, num_ranked=num_ranked, mesh=mesh).run(params, 0)
            assert [row["prediction"] for row in result.predictions] == expected[num_ranked]
    assert expected[1] != expected[99]  # or the test shows nothing


def test_the_release_counts_the_first_token_twice_and_needs_no_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts: list[TaskContext] = []
    monkeypatch.setattr(loop, "jit_predict", lambda task, model_def, context, mesh: contexts.append(context))
    config = dataclasses.replace(CONTEXT.config, search=SearchConfig(extend_finished=True, max_length=1))
    monkeypatch.setitem(globals(), "CONTEXT", dataclasses.replace(CONTEXT, config=config))
    path = write(tmp_path, ANSWERS)
    make_evaluation("answer", path, num_ranked=3)
    make_evaluation("answer", path, num_ranked=3, examples=dataclasses.replace(QUESTIONS, tokenization="released"))
    assert [context.double_count_first_token for context in contexts] == [False, True]
