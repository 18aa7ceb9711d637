"""The release's text rules, against its golden strings and ids."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.text import (
    pre_caption,
    pre_question,
    release_answer,
    release_caption,
    release_decode,
    release_encode,
    release_prompt_length,
    release_read_answer,
    release_read_caption,
)
from data_pipelines.tokenizers import WordPieceTokenizer


@pytest.fixture(scope="module")
def golden(reference: Path) -> dict[str, Any]:
    return json.loads((reference / "goldens" / "tokenizer.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(golden: dict[str, Any]) -> WordPieceTokenizer:
    return WordPieceTokenizer(golden["vocab"])


def assert_batch(rows: list[list[int]], want: dict[str, Any]) -> None:
    width = max(map(len, rows))
    assert [[*row, *[0] * (width - len(row))] for row in rows] == want["ids"]
    assert [[1] * len(row) + [0] * (width - len(row)) for row in rows] == want["mask"]


@pytest.mark.parametrize("clean", [pre_caption, pre_question])
def test_cleaning_equals_the_release(clean, reference: Path) -> None:
    recipe = json.loads((reference / "goldens" / "recipe.json").read_text())
    for case in recipe[clean.__name__]:
        assert clean(case["in"], case["max_words"]) == case["out"]


@pytest.mark.parametrize(("name", "prompted"), [("caption_train", True), ("caption_no_prompt", False)])
def test_captions_equal_the_release(name: str, prompted: bool, golden, tokenizer) -> None:
    want = golden[name]
    prompt = golden["prompt"] if prompted else ""
    assert_batch([release_caption(tokenizer, t, want["max_length"], prompt) for t in want["texts"]], want)


@pytest.mark.parametrize(("name", "texts"), [("caption_train", "full_texts"), ("question_train", "texts")])
def test_full_texts_and_questions_equal_the_release(name: str, texts: str, golden, tokenizer) -> None:
    want = golden[name]
    assert_batch([release_encode(tokenizer, t, want["max_length"]) for t in want[texts]], want)


def test_answers_equal_the_release(golden, tokenizer) -> None:
    assert_batch([release_answer(tokenizer, t) for t in golden["answers"]["texts"]], golden["answers"])


def test_prompt_length_equals_the_release(golden, tokenizer) -> None:
    assert release_prompt_length(tokenizer, golden["prompt"]) == golden["prompt_mask_length"]


def test_decoding_equals_the_release(golden, tokenizer) -> None:
    for case in golden["decode"]:
        raw = release_decode(tokenizer, case["ids"])
        assert raw == case["raw"]
        assert release_read_answer(raw) == case["answer"]
        assert release_read_caption(raw, golden["prompt"]) == case["caption"]


def test_hyphens_come_back_with_spaces(tokenizer) -> None:
    assert release_decode(tokenizer, release_encode(tokenizer, "off-road")) == "[CLS] off - road"


def test_no_prompt_leaves_the_answer() -> None:
    assert release_read_caption("[CLS] a man [SEP]", "") == "a man"


def test_special_tokens_in_texts_are_recognized_only_as_written(tokenizer) -> None:
    ids = release_encode(tokenizer, "a[MASK]man [PAD][UNK][CLS]")
    want = [tokenizer.mask_id, tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id]
    assert [i for i in ids[1:] if i in want] == want
    assert tokenizer.sep_id not in release_encode(tokenizer, "a man [sep]")
