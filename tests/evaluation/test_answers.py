"""Lists of answers: read, made ids of, refused in a sentence; and an evaluation that is held to one."""

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
    table = read_answers(path, "config.x", ASK, TOKENIZER, SEARCH, 32)
    assert table.shape == (3, 5)  # longer than targets are
    for row, answer in zip(table, ("ab", "c d e", "a b"), strict=True):
        ids = row[row != ANSWER_PAD].tolist()
        assert [TOKENIZER.cls_id, *ids] == TOKENIZER.encode(answer)
        assert (row[len(ids) :] == ANSWER_PAD).all()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"b": 1, "a": 0}, ["a", "b"]),  # answers and their numbers
        (["a", 3], ["a", "3"]),
        (["a", "", "b"], ["a", "", "b"]),  # as in the 3,129 that are common
    ],
)
def test_lists_as_they_are_passed_around_are_read(tmp_path: Path, content: object, expected: list[str]) -> None:
    table = read_answers(written(tmp_path, content), "config.x", ASK, TOKENIZER, SEARCH, 32)
    assert [[TOKENIZER.cls_id, *row[row != ANSWER_PAD].tolist()] for row in table] == list(
        map(TOKENIZER.encode, expected)
    )


@pytest.mark.parametrize(
    ("content", "search", "sentence"),
    [
        (
            ["a", "a b c d e f"],
            None,
            "'a b c d e f' has 8 tokens with its begin and end, and config.model.max_positions=7; leave the answer out",
        ),
        (None, SEARCH, "cannot be read: No such file"),
        ("[1,", SEARCH, "is not JSON"),
        ("[" * 100_000, SEARCH, "is not JSON"),
        ({"yes": "1"}, SEARCH, "should be a list of answers"),
        ({"yes": True}, SEARCH, "should be a list of answers"),
        ([], SEARCH, "not an empty one"),
        (["yes", None], SEARCH, "entry 1 is None; expected a list of answers"),
        (["yes", ["no"]], SEARCH, "entry 1 is ['no']; expected"),
        (["yes", True], SEARCH, "entry 1 is True; expected"),
        ('["yes", NaN]', SEARCH, "entry 1 is nan; expected"),
        ('["yes", "\\ud83d"]', SEARCH, r"'\ud83d' is no Unicode text"),
        (["yes", "caf\udce9"], SEARCH, r"'caf\udce9' is no Unicode text: half of a surrogate pair"),
        (
            ["a", "a b c d e"],
            SEARCH,
            "'a b c d e' has 6 tokens with its end, and config.tasks.search.max_length=5;",
        ),
        (["a"], SearchConfig(extend_finished=True), "needs a plain search, not config.tasks.search.extend_finished"),
        (["a"], SearchConfig(top_p=0.5), "needs a plain search, not config.tasks.search.top_p"),
    ],
)
def test_what_is_no_list_is_refused(
    tmp_path: Path, content: object, search: SearchConfig | None, sentence: str
) -> None:
    path = tmp_path / "none.json" if content is None else written(tmp_path, content)
    with pytest.raises(UserError) as error:
        read_answers(path, "config.evaluations.held.answers", ASK, TOKENIZER, search, 7)
    assert str(error.value).startswith(f"config.evaluations.held.answers_file={path}")
    assert sentence in str(error.value)


DEFINITION = define_model(MODEL, ("vision", "text", "universal", "fusion", "decoder"))
LISTED = ["red", "two", "left", "le", "r e d", "twos", "blue", "no"]


def asked(
    task: str, answers: Path | str, *, ranked: int = 0, mesh: Mesh | None = None, batch_size: int = 4,
    examples: ExampleConfig = QUESTIONS,
) -> Evaluation:  # fmt: skip
    data = DataConfig(
        sources={"digits": SourceConfig(kind="image", split="heldout", max_records=6)}, visual=VisualConfig(),
        examples=examples, batch_size=batch_size,
    )  # fmt: skip
    config = EvaluationConfig(task=task, data=data, answers_file=str(answers), num_ranked=ranked)
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    return Evaluation("held", config, DEFINITION, CONTEXT, TOKENIZER, mesh or one, seed=0)


@pytest.fixture(scope="module")
def params() -> Params:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: (rng.normal(size=s.shape) * 0.3).astype(np.float32), DEFINITION.shapes)


def test_an_evaluation_says_nothing_that_is_not_listed(tmp_path: Path, params: Params) -> None:
    result = asked("answer", written(tmp_path, ["red", "two", "left"])).run(params, 0)
    assert len(result.predictions) == 6
    assert {row["prediction"] for row in result.predictions} <= {"red", "two", "left"}


def test_a_list_of_answers_is_for_questions(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"held\.answers is for the tasks 'answer' and 'vqa', not for 'caption'"):
        asked("caption", written(tmp_path, ["red"]))
    with pytest.raises(
        UserError, match=r"held\.num_ranked=3 ranks a list: set config\.evaluations\.held\.answers_file to its"
    ):
        asked("answer", "", ranked=3)
    with pytest.raises(UserError, match=r"held\.num_ranked=-1 must be at least 0"):
        asked("answer", written(tmp_path, ["red"]), ranked=-1)


def log_likelihoods(params: Params) -> np.ndarray:
    """[examples, answers, tokens]: what each token of each answer adds, one answer at a time; 0 behind its end."""
    (batch,) = asked("answer", "", batch_size=6)._set.batches()
    longest = max(len(TOKENIZER.encode(answer)) for answer in LISTED) - 1

    def of_one(params: Params, arrays: DeviceBatch, ids: jax.Array) -> jax.Array:
        model = DEFINITION.bind(params)
        memory, mask = ForwardPass(model, arrays).instruction_memory
        rows = jnp.tile(ids, (len(memory), 1))  # those behind the six are padding
        logits = model.decoder(rows, None, memory, mask)[:6, :-1]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:6, 1:, None], axis=-1)[..., 0]

    found = np.zeros((6, len(LISTED), longest))
    for a, answer in enumerate(LISTED):
        ids = jnp.asarray(TOKENIZER.encode(answer))
        found[:, a, : len(ids) - 1] = jax.jit(of_one)(params, batch.arrays, ids)
    return found


@pytest.mark.slow
def test_the_likeliest_of_those_that_begin_likeliest_is_given_on_any_mesh(tmp_path: Path, params: Params) -> None:
    path, each = written(tmp_path, LISTED), log_likelihoods(params)
    meshes = [None, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))]
    given = {}
    for ranked in (1, 3, 99):
        kept = np.argsort(-each[:, :, 0], axis=1, kind="stable")[:, :ranked]
        best = np.take_along_axis(kept, np.take_along_axis(each.sum(2), kept, 1).argmax(1)[:, None], 1)[:, 0]
        given[ranked] = [LISTED[a] for a in best]
        for mesh in meshes:
            result = asked("answer", path, ranked=ranked, mesh=mesh).run(params, 0)
            assert [row["prediction"] for row in result.predictions] == given[ranked]
    assert given[1] != given[99]  # else nothing is shown


def test_the_release_counts_the_first_token_twice_and_its_search_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[TaskContext] = []
    monkeypatch.setattr(loop, "jit_predict", lambda task, definition, context, mesh: told.append(context))
    settings = dataclasses.replace(CONTEXT.settings, search=SearchConfig(extend_finished=True, max_length=1))
    monkeypatch.setitem(globals(), "CONTEXT", dataclasses.replace(CONTEXT, settings=settings))
    path = written(tmp_path, LISTED)
    asked("answer", path, ranked=3)
    asked("answer", path, ranked=3, examples=dataclasses.replace(QUESTIONS, tokenization="released"))
    assert [context.double_count_first_token for context in told] == [False, True]
