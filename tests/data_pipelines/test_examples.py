"""Examples: fields, lengths and both tokenizations; the released one against golden values."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.config import ExampleConfig, InstructionConfig, VisualConfig
from data_pipelines.digitworld.source import DigitWorld, vocabulary_texts
from data_pipelines.errors import DataError
from data_pipelines.examples import example_id, make_detokenizer, make_example, parse_box, quantize_box
from data_pipelines.record import Expression, Question, Record
from data_pipelines.tokenizers import WordPieceTokenizer, train_sentencepiece, train_wordpiece
from data_pipelines.visual import load_visual
from tests.close import assert_close

TOKENIZER = train_wordpiece(vocabulary_texts(100), 200)
CAPTION = {"caption": InstructionConfig(templates=("describe the picture",))}


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_lengths_determine_the_fields() -> None:
    record = DigitWorld("image")[0]
    bare = make_example(record, ExampleConfig(), TOKENIZER, rng())
    assert set(bare.arrays) == {"example_id"}
    visual = load_visual(record.frames, VisualConfig(num_frames=1), rng())
    assert set(make_example(record, ExampleConfig(), TOKENIZER, rng(), visual).arrays) == {"example_id", "frames"}
    texts = make_example(record, ExampleConfig(text_length=16, word_starts=True), TOKENIZER, rng())
    assert {"text", "text_mask", "word_starts"} <= set(texts.arrays)
    unasked = make_example(record, ExampleConfig(instructions=CAPTION, target_length=16), TOKENIZER, rng())
    assert {"target", "target_weights"} <= set(unasked.arrays)
    assert "instruction" not in unasked.arrays
    question = ExampleConfig(instructions=CAPTION, target_length=16, instruction_length=8)
    assert {"instruction", "instruction_mask", "target"} <= set(make_example(record, question, TOKENIZER, rng()).arrays)


def test_masks_and_weights_cover_exactly_the_tokens() -> None:
    config = ExampleConfig(text_length=24, instructions=CAPTION, instruction_length=12, target_length=24)
    example = make_example(DigitWorld("video")[3], config, TOKENIZER, rng())
    for ids, mask in (("text", "text_mask"), ("instruction", "instruction_mask"), ("target", "target_weights")):
        np.testing.assert_array_equal(example.arrays[ids] != 0, example.arrays[mask] > 0)
    words = TOKENIZER.decode(example.arrays["target"].tolist())
    assert example.answers[0].startswith(words)


def test_instructions_are_drawn_by_weight_among_those_of_the_record() -> None:
    config = ExampleConfig(
        instructions={
            "caption": InstructionConfig(templates=("describe",), weight=1.0),
            "question": InstructionConfig(templates=("{question}",), weight=3.0),
            "entailment": InstructionConfig(templates=("{premise}",), weight=100.0),  # pictures have none
        },
        instruction_length=16,
        target_length=24,
    )
    record, generator = DigitWorld("image")[0], rng()
    question = [make_example(record, config, TOKENIZER, generator).instruction == "describe" for _ in range(400)]
    assert 0.18 < np.mean(question) < 0.32


def test_every_kind_of_instruction_has_values_and_answers() -> None:
    image, text = DigitWorld("image")[0], DigitWorld("text")[0]
    for kind, record, template in (
        ("caption", image, "describe"), ("question", image, "{question}"), ("label", image, "which digit?"),
        ("box", image, "where is {expression}?"), ("entailment", text, "{premise} so {hypothesis}?"),
    ):  # fmt: skip
        config = ExampleConfig(
            instructions={kind: InstructionConfig(templates=(template,))}, instruction_length=32, target_length=24
        )
        example = make_example(record, config, TOKENIZER, rng())
        assert example.instruction
        assert "{" not in example.instruction
        assert all(example.answers)


def test_boxes_are_quantized_to_a_grid() -> None:
    assert quantize_box((0.0, 0.25, 0.5, 1.0)) == "0 8 16 31"


def test_ids_are_stable_and_fit_a_signed_integer() -> None:
    assert example_id("a") == example_id("a") != example_id("b")
    assert all(0 <= example_id(str(i)) < 2**63 for i in range(100))


def test_records_without_required_fields_are_an_error() -> None:
    with pytest.raises(DataError, match="record r has no caption"):
        make_example(Record(key="r"), ExampleConfig(text_length=8), TOKENIZER, rng())
    with pytest.raises(DataError, match="record r has nothing for the instructions caption"):
        make_example(Record(key="r"), ExampleConfig(instructions=CAPTION, target_length=8), TOKENIZER, rng())


def test_a_template_with_unknown_placeholders_lists_the_valid_ones() -> None:
    config = ExampleConfig(instructions={"question": InstructionConfig(templates=("{what}",))}, target_length=8)
    with pytest.raises(DataError, match=r"valid placeholders: \{question\}"):
        make_example(DigitWorld("image")[0], config, TOKENIZER, rng())


# --- the released form ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(reference: Path) -> WordPieceTokenizer:
    return WordPieceTokenizer(json.loads((reference / "goldens" / "tokenizer.json").read_text())["vocab"])


def test_released_captions_are_appended_to_the_prompt_which_is_masked(bert) -> None:
    config = ExampleConfig(tokenization="released", prompt="a video of", instructions=CAPTION, target_length=20)
    record = Record(key="r", captions=("A man!",))
    example = make_example(record, config, bert, rng())
    pieces = bert.tokens(example.arrays["target"][example.arrays["target"] != 0].tolist())
    glued = "".join(piece.removeprefix("##") for piece in pieces[1:-1])
    assert glued == "avideoofaman"
    assert pieces[3:5] == ["of", "##a"]  # one word, "ofa", is what the weights expect
    assert pieces[-1] == "[SEP]"
    learned = example.arrays["target_weights"]
    assert learned[:3].tolist() == [0, 0, 0]
    assert learned[3] == 1  # the release masks one label too few
    assert make_detokenizer(config, bert)(example.arrays["target"].tolist()) == "a man"


def test_texts_that_the_release_cleans_to_nothing_are_not_sampled(bert) -> None:
    both = ExampleConfig(tokenization="released", instructions=CAPTION, text_length=8, target_length=8)
    for seed in range(4):
        sampled = np.random.default_rng(seed)
        example = make_example(Record("r", captions=("...", "a man", "?!")), both, bert, sampled)
        assert (example.text, example.answers) == ("a man", ("a man",))
    with pytest.raises(DataError, match="record r has no caption with words besides punctuation"):
        make_example(Record("r", captions=("...",)), both, bert, rng())
    question = ExampleConfig(
        tokenization="released",
        instructions={"question": InstructionConfig(templates=("{question}",))},
        target_length=8,
    )
    with pytest.raises(
        DataError, match="has nothing for the instructions question, or nothing with words besides punctuation"
    ):
        make_example(Record("r", questions=(Question("?", "yes"),)), question, bert, rng())
    pair = ExampleConfig(
        tokenization="released",
        instructions={"label": InstructionConfig(templates=("{text}|{other}",))},
        target_length=8,
    )
    example = make_example(Record("r", texts=("...", "b"), label="yes"), pair, bert, rng())
    assert example.instruction == "...|b"  # of a pair neither is left out


def test_released_questions_end_without_sep_and_answers_with_one(bert) -> None:
    config = ExampleConfig(
        tokenization="released", instructions={"question": InstructionConfig(templates=("{question}",))},
        instruction_length=20, target_length=10,
    )  # fmt: skip
    record = Record(key="r", questions=(Question("What is a man playing?", "riding"),))
    arrays = make_example(record, config, bert, rng()).arrays
    assert bert.tokens(arrays["instruction"][arrays["instruction_mask"]].tolist())[-1] == "playing"
    assert bert.tokens(arrays["target"][arrays["target"] != 0].tolist())[-1] == "[SEP]"
    assert arrays["target_weights"].tolist() == (arrays["target"] != 0).astype(float).tolist()


def test_a_truncated_released_caption_loses_its_sep(bert) -> None:
    config = ExampleConfig(tokenization="released", prompt="a video of", instructions=CAPTION, target_length=6)
    record = Record(key="r", captions=("a man is riding a man is riding",))
    target = make_example(record, config, bert, rng()).arrays["target"]
    assert target.all()
    assert bert.sep_id not in target


def test_released_tokenization_needs_wordpiece() -> None:
    pieces = train_sentencepiece(vocabulary_texts(100), 160)
    config = ExampleConfig(tokenization="released", text_length=8)
    with pytest.raises(DataError, match="found a SentencePieceTokenizer"):
        make_example(DigitWorld("image")[0], config, pieces, rng())


def labeled_record(label, texts=()):
    return Record("a/1", label=label, texts=texts)


LABEL = {"label": InstructionConfig(templates=("{text} | {other}",))}


def test_a_label_is_the_index_of_its_class():
    config = ExampleConfig(instructions={"label": InstructionConfig(templates=("",))}, classes=("cat", "dog"))
    example = make_example(labeled_record("dog"), config, TOKENIZER, rng())
    assert example.arrays["label"] == 1
    assert example.arrays["label"].dtype == np.int32
    assert set(example.arrays) == set(config.shapes()) == {"example_id", "label"}
    with pytest.raises(
        DataError, match="record a/1 has the class 'dig', expected one of the 2 classes; did you mean 'dog'"
    ):
        make_example(labeled_record("dig"), config, TOKENIZER, rng())


def test_a_number_gets_the_nearest_class_and_two_texts_are_distinct_fields():
    config = ExampleConfig(instructions=LABEL, instruction_length=12, classes=("0.0", "2.5", "5.0"))
    example = make_example(labeled_record("3.2", ("one", "two")), config, TOKENIZER, rng())
    assert example.arrays["label"] == 1
    assert example.instruction == "one | two"


def test_examples_of_boxes_include_the_box():
    record = Record("a/1", expressions=(Expression("it", (0.0, 0.26, 0.5, 1.0)),))
    box = {"box": InstructionConfig(templates=("where is {expression}?",))}
    config = ExampleConfig(instructions=box, instruction_length=12, target_length=8)
    example = make_example(record, config, TOKENIZER, rng())
    assert_close(example.arrays["box"], [0.0, 0.26, 0.5, 1.0])
    assert set(example.arrays) == set(config.shapes())
    mixed = ExampleConfig(instructions={**box, **LABEL}, instruction_length=12, target_length=8)
    assert "box" not in mixed.shapes()


@given(st.tuples(*[st.floats(0, 1)] * 4))
def test_a_parsed_box_contains_the_cells_of_its_corners(box):
    x0, y0, x1, y1 = box
    parsed = parse_box(quantize_box((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))))
    assert parsed is not None
    assert parsed[0] <= min(x0, x1) <= max(x0, x1) <= parsed[2]
    assert parsed[1] <= min(y0, y1) <= max(y0, y1) <= parsed[3]


@pytest.mark.parametrize("words", ["", "1 2 3", "1 2 3 32", "1 2 3 4 5", "a b c d", "-1 2 3 4"])
def test_invalid_boxes_are_none(words):
    assert parse_box(words) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"instructions": CAPTION}, "instructions need target_length"),
        ({"prompt": "a video of"}, "prompt='a video of' needs tokenization='released'"),
        ({"classes": ("a", "a"), "instructions": LABEL}, "2 names, only 1 of them distinct"),
        ({"classes": ("a", "b"), "instructions": {}}, "classes need instructions"),
        (
            {"classes": ("a", "b"), "instructions": {"caption": InstructionConfig(templates=("",))}},
            "classes need instructions of kind 'label' or 'entailment', found caption",
        ),
        ({"target_length": 8, "max_references": -1}, "max_references=-1 counts captions"),
        ({"target_length": 8, "max_references": 2}, "max_references=2 counts captions"),
        (
            {"target_length": 8, "max_references": 2, "instructions": CAPTION | LABEL},
            "max_references=2 counts captions",
        ),
    ],
)
def test_inconsistent_configs_are_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ExampleConfig(**fields)


def test_references_are_captions_encoded_as_targets() -> None:
    config = ExampleConfig(instructions=CAPTION, target_length=8, max_references=3)
    record = Record(key="r", captions=("a red four", "a green two moves left and right and up and down"))
    parsed = make_example(record, config, TOKENIZER, rng()).arrays
    assert parsed["references"].shape == config.shapes()["references"][0] == (3, 8)
    assert {tuple(row) for row in parsed["references"][:2].tolist()} == {
        tuple((TOKENIZER.encode(caption, max_length=8) + 8 * [0])[:8]) for caption in record.captions
    }
    assert not parsed["references"][2].any()
    np.testing.assert_array_equal(parsed["references"][0], parsed["target"])
