"""A corpus cut into chunks: no token is lost or repeated, and only the same tokenizer may read it."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig
from data_pipelines.digitworld import vocabulary_texts
from data_pipelines.errors import DataError
from data_pipelines.examples import make_example
from data_pipelines.loader import Stream
from data_pipelines.preparation.corpus import chunk_corpus, write_corpus
from data_pipelines.sources.array_record import ArrayRecordSource
from data_pipelines.sources.files import read_lines
from data_pipelines.tokenizers import train_wordpiece, vocab_fingerprint

TOKENIZER = train_wordpiece(vocabulary_texts(60), 160)
WORDS = st.lists(
    st.lists(st.sampled_from(["red", "four", "moves", "left", "a", "zebra"]), max_size=9).map(" ".join), max_size=9
)


@settings(max_examples=40)
@given(lines=WORDS, length=st.integers(3, 12))
def test_the_chunks_contain_the_text(lines: list[str], length: int, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("corpus") / "a.txt"
    path.write_text("\n".join(lines))
    pieces = [record.tokens for record in chunk_corpus(read_lines([path]), TOKENIZER, length)]
    assert all(len(piece) == length for piece in pieces[:-1])
    assert all((piece[0], piece[-1]) == (TOKENIZER.cls_id, TOKENIZER.sep_id) for piece in pieces)
    whole = [token for line in lines for token in TOKENIZER.encode(line)[1:-1]]
    assert [token for piece in pieces for token in piece[1:-1]] == whole


def test_a_corpus_is_a_text_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a red four moves left\n" * 40)
    out = tmp_path / "c.array_record"
    count = write_corpus([tmp_path / "a.txt"], TOKENIZER, 16, out)
    assert count > 5
    source = SourceConfig(format="array_record", path=str(out), kind="text")
    examples = ExampleConfig(text="sentence", text_length=16, word_starts=True)
    config = DataConfig(sources={"c": source}, examples=examples, batch_size=2)
    batch = Stream(config, TOKENIZER, name="s", seed=0).batch(0)
    assert batch.arrays["text"].shape == (2, 16)
    assert batch.rows[0].example.text == TOKENIZER.decode(batch.arrays["text"][0].tolist())
    np.testing.assert_array_equal(
        batch.arrays["word_starts"], [TOKENIZER.word_starts(row) for row in batch.arrays["text"].tolist()]
    )
    record, rng = ArrayRecordSource(str(out))[0], np.random.default_rng(0)
    short, fits = (ExampleConfig(text="sentence", text_length=length) for length in (8, 16))
    with pytest.raises(
        DataError, match=rf"0 has 16 tokens of tokenizer {vocab_fingerprint(TOKENIZER)}, expected at most text_l"
    ):
        make_example(record, short, TOKENIZER, rng)
    other = train_wordpiece(vocabulary_texts(60), 120)
    with pytest.raises(DataError, match=rf"text_length=16 of {vocab_fingerprint(other)}; chunk the corpus again"):
        make_example(record, fits, other, rng)


def test_invalid_corpora_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\n")
    (tmp_path / "b.txt").write_text("\n \n")
    out = tmp_path / "c.array_record"
    for files, length, message in (
        (["a.txt"], 8, r"text file .*a\.txt is not UTF-8: .* in line 2"), (["b.txt"], 8, r"b\.txt: found no text"),
        (["b.txt"], 2, "the chunk length is 2, expected at least 3"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            write_corpus([tmp_path / name for name in files], TOKENIZER, length, out)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]
    out.write_text("mine")
    with pytest.raises(DataError, match=r"exists or does not end in \.array_record"):
        write_corpus([tmp_path / "a.txt"], TOKENIZER, 8, out)
    assert out.read_text() == "mine"
