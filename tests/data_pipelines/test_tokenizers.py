"""Both tokenizers: special tokens, round trips, training, files, errors."""

import io
import pickle
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer

from data_pipelines.digitworld import vocabulary_texts
from data_pipelines.errors import DataError
from data_pipelines.tokenizers import (
    SPECIAL_TOKENS,
    SentencePieceTokenizer,
    Tokenizer,
    WordPieceTokenizer,
    join_wordpieces,
    load_tokenizer,
    train_sentencepiece,
    train_wordpiece,
)

TEXTS = list(vocabulary_texts(100))
WORDS = sorted({word for text in TEXTS for word in text.replace("?", "").split()})
TOKENIZERS: dict[str, Tokenizer] = {
    "wordpiece": train_wordpiece(TEXTS, 160),
    "sentencepiece": train_sentencepiece(TEXTS, 160),
}

both = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=20).map(" ".join)


@both
@given(text=sentences, question=st.booleans())
def test_text_survives_the_round_trip(tokenizer: Tokenizer, text: str, question: bool) -> None:
    text += "?" * question
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text() | sentences)
def test_the_json_of_hugging_face_encodes_to_the_same_ids(text: str) -> None:
    assume(not any(token in text for token in SPECIAL_TOKENS))
    wordpiece = TOKENIZERS["wordpiece"]
    assert isinstance(wordpiece, WordPieceTokenizer)
    assert LibraryTokenizer.from_str(wordpiece.to_json()).encode(text).ids == wordpiece.encode(text)


@both
@given(text=sentences, max_length=st.integers(2, 30), add_sep=st.booleans())
def test_truncation_keeps_special_tokens(tokenizer: Tokenizer, text: str, max_length: int, add_sep: bool) -> None:
    whole, cut = tokenizer.encode(text, add_sep=False), tokenizer.encode(text, max_length, add_sep)
    assert cut[0] == tokenizer.cls_id
    assert len(cut) == min(max_length, len(whole) + add_sep)
    assert (cut[-1] == tokenizer.sep_id) == add_sep
    assert cut[: len(cut) - add_sep] == whole[: len(cut) - add_sep]


@both
@given(text=st.text() | st.sampled_from([f"a{token}b {token}" for token in SPECIAL_TOKENS]))
def test_no_text_encodes_to_special_tokens(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)[1:-1]
    assert not {tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id} & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@both
@given(text=sentences)
def test_word_starts_count_the_words(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    starts = tokenizer.word_starts(ids)
    assert starts.sum() == len(text.split()) + 2
    assert starts[0]
    assert starts[-1]


@both
def test_words_of_several_tokens_start_once(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("redred blue", add_sep=False)
    assert len(ids) > 3
    assert tokenizer.word_starts(ids).sum() == 3


@both
def test_special_tokens_come_first_and_are_words(tokenizer: Tokenizer) -> None:
    special = [tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]
    assert special == [0, 1, 2, 3, 4]
    assert tuple(tokenizer.tokens(special)) == SPECIAL_TOKENS
    assert tokenizer.word_starts(special).all()
    assert tokenizer.word_starts([]).shape == (0,)


@both
def test_ids_beyond_the_vocabulary_decode_to_unknown(tokenizer: Tokenizer) -> None:
    beyond = tokenizer.vocab_size + 7
    assert tokenizer.tokens([beyond]) == ["[UNK]"]
    assert "[UNK]" in tokenizer.decode([tokenizer.encode("red")[1], beyond])


@both
def test_unknown_and_mask_tokens_are_decoded(tokenizer: Tokenizer) -> None:
    unknown = tokenizer.encode("a 好 red")
    assert tokenizer.unk_id in unknown
    assert tokenizer.decode(unknown) == "a [UNK] red"
    masked = [tokenizer.mask_id if i == tokenizer.encode("red")[1] else i for i in tokenizer.encode("a red")]
    assert "[MASK]" in tokenizer.decode(masked)


@both
def test_saved_and_pickled_tokenizers_are_equal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tokenizer.save(tmp_path / "new" / "folder")
    for copy in (load_tokenizer(file), load_tokenizer(file.parent), pickle.loads(pickle.dumps(tokenizer))):  # noqa: S301
        assert type(copy) is type(tokenizer)
        everything = range(tokenizer.vocab_size)
        assert copy.tokens(everything) == tokenizer.tokens(everything)
        assert [copy.encode(text) for text in TEXTS[:50]] == [tokenizer.encode(text) for text in TEXTS[:50]]


@both
@pytest.mark.parametrize(("max_length", "add_sep"), [(1, True), (0, False)])
def test_no_room_for_special_tokens(tokenizer: Tokenizer, max_length: int, add_sep: bool) -> None:
    assert tokenizer.encode("red", 1, add_sep=False) == [tokenizer.cls_id]
    with pytest.raises(DataError, match=f"max_length is {max_length}, expected at least"):
        tokenizer.encode("red", max_length, add_sep)


@pytest.mark.parametrize("train", [train_wordpiece, train_sentencepiece])
def test_training_is_deterministic_and_bounded(train) -> None:
    first, second = train(iter(TEXTS), 90), train(iter(TEXTS), 90)
    assert first.tokens(range(first.vocab_size)) == second.tokens(range(second.vocab_size))
    assert first.vocab_size <= 90
    assert train(["red"], 5000).vocab_size < 20


@pytest.mark.parametrize("train", [train_wordpiece, train_sentencepiece])
def test_a_vocabulary_smaller_than_the_alphabet(train) -> None:
    with pytest.raises(DataError, match=r"vocab_size.*12.*expected"):
        train(TEXTS, 12)


def test_training_without_texts() -> None:
    with pytest.raises(DataError, match="expected some text"):
        train_sentencepiece([], 100)


def test_wordpiece_ignores_case_and_accents() -> None:
    tokenizer = TOKENIZERS["wordpiece"]
    assert tokenizer.encode("RÉD  Sevén") == tokenizer.encode("red seven")


def test_wordpiece_needs_exactly_the_named_alphabet() -> None:
    needed = 5 + 2 * len(set("redblue"))
    assert train_wordpiece(["red blue"], needed).vocab_size == needed
    with pytest.raises(DataError, match=f"expected at least {needed}"):
        train_wordpiece(["red blue"], needed - 1)


def test_join_cleans_up_as_bert_does() -> None:
    assert join_wordpieces(["don", "'", "t", "stop", ",", "it", "'", "s", "##o", "!"]) == "don't stop, it'so!"


@pytest.mark.parametrize("options", [{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}, {}])
def test_sentencepiece_models_of_other_projects_work(options: dict[str, int]) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=80, minloglevel=2, **options
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    assert tokenizer.pad_id == 0
    assert tokenizer.decode(tokenizer.encode("a red seven 好")) == "a red seven [UNK]"


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("vocab.txt", b"red\nblue\n", r"vocab.txt has 2 entries and lacks \[PAD\], .*\[MASK\]"),
        ("vocab.txt", b"", "lacks"),
        ("vocab.txt", "\n".join((*SPECIAL_TOKENS[::-1], "a")).encode(), r"begins with '\[MASK\]'"),
        ("vocab.txt", "\n".join((*SPECIAL_TOKENS, "a", "a")).encode(), "some empty or duplicate"),
        ("vocab.txt", "\n".join((*SPECIAL_TOKENS, "", "a")).encode(), "some empty or duplicate"),
        ("vocab.txt", b"[PAD]\n\xff\xfe", "byte 6 is not UTF-8"),
        ("some.model", b"", "damaged: its 0 bytes"),
        ("some.model", b"not a model at all", "damaged"),
    ],
)
def test_damaged_files(name: str, data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(write(tmp_path / name, data))
    assert name in str(caught.value)


def test_truncated_model(tmp_path: Path) -> None:
    data = TOKENIZERS["sentencepiece"].save(tmp_path).read_bytes()
    with pytest.raises(DataError, match="damaged"):
        load_tokenizer(write(tmp_path / "cut.model", data[: len(data) // 2]))


def test_missing_files_and_empty_directories(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing does not exist"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(DataError, match="holds 0 tokenizers"):
        load_tokenizer(tmp_path)


def test_vocabulary_files_split_at_line_feeds_only(tmp_path: Path) -> None:
    pieces = [*SPECIAL_TOKENS, "a", "\u2028", "b"]
    path = write(tmp_path / "vocab.txt", "\r\n".join(pieces).encode())
    assert isinstance(load_tokenizer(path), WordPieceTokenizer)
    assert load_tokenizer(path).tokens(range(8)) == pieces
