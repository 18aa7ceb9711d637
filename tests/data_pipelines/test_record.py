"""Records: their texts are valid Unicode and visible."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.media import Media
from data_pipelines.record import Entailment, Expression, Question, Record, clean_text

SURROGATES = ("so happy \ud83d", "\ude00", "caf\udce9.jpg")
INVISIBLE = ("", " \n", "\u00a0\u3000", "\u200b\ufeff", "\u2060\u00ad", "\0\x07", "\u0301", "\ufe0f", "\u3164\u2800",
         "\ue000", "\ufffd", "\U000e0041")  # fmt: skip
RECORDS = {
    "key": lambda text: Record(text),
    "visual_id": lambda text: Record("k", visual_id=text),
    "media": lambda text: Record("k", media=Media("image", b"", text)),
    "captions": lambda text: Record("k", captions=("a", text)),
    "texts": lambda text: Record("k", texts=(text,)),
    "label": lambda text: Record("k", label=text),
    "question": lambda text: Record("k", questions=(Question(text, "a"),)),
    "answer": lambda text: Record("k", questions=(Question("q", text),)),
    "alternative_answers": lambda text: Record("k", questions=(Question("q", "a", "", (text,)),)),
    "expression": lambda text: Record("k", expressions=(Expression(text, (0.0, 0.0, 1.0, 1.0)),)),
    "premise": lambda text: Record("k", entailments=(Entailment(text, "h", "yes"),)),
}


@pytest.mark.parametrize("text", SURROGATES, ids=ascii)
@pytest.mark.parametrize("field", RECORDS)
def test_an_unpaired_surrogate_is_an_error_in_any_field(field: str, text: str) -> None:
    with pytest.raises(DataError, match="is not Unicode text: unpaired surrogate at character") as error:
        RECORDS[field](text)
    assert str(error.value).isascii()


@pytest.mark.parametrize("text", INVISIBLE, ids=ascii)
def test_invisible_texts_are_dropped(text: str) -> None:
    assert clean_text(text) == ""
    assert RECORDS["captions"](text).captions == ("a",)
    assert RECORDS["alternative_answers"](text).questions == (
        Question("q", "a", "", ("",)),
    )  # an annotator who wrote nothing
    for field in ("texts", "label", "question", "answer", "expression", "premise"):
        assert RECORDS[field](text) == Record("k")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a\0b", "ab"), (" a\x07 \u202eb\u202c ", "a \u202eb\u202c"), ("...", "..."), ("a\tb\nc\x85d", None),
        ("\U0001f468\u200d\U0001f469", None), ("\U0001faea", None), ("\u0915\u094d\u200d", None),
    ],
)  # fmt: skip
def test_control_characters_are_removed(text: str, clean: str | None) -> None:
    assert clean_text(text) == (text if clean is None else clean)


@given(st.text())
def test_cleaning_is_idempotent(text: str) -> None:
    assert clean_text(clean_text(text)) == clean_text(text)
    record = Record("k", captions=(text,))
    assert dataclasses.replace(record) == record
