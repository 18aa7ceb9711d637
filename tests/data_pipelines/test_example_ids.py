"""Which examples are the same picture: those of one source that show the same, and no others."""

import dataclasses
from pathlib import Path

import pytest

from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig, VisualConfig
from data_pipelines.loader import EvaluationSet, Stream
from data_pipelines.tokenizers import WordPieceTokenizer, train_wordpiece

from .worlds import img2dataset


@pytest.fixture(scope="module")
def tokenizer() -> WordPieceTokenizer:
    return train_wordpiece(["a small red four in the middle"], 60)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Two sets, whose tars and samples have equal names, as img2dataset gives them."""
    sources = {}
    for place, name in enumerate(("cc3m", "laion")):
        (tmp_path / name).mkdir()
        img2dataset(tmp_path / name / "00000.tar", 4 + 4 * place)
        sources[name] = SourceConfig(format="webdataset", path=str(tmp_path / name))
    return DataConfig(
        sources=sources,
        visual=VisualConfig(image_size=8),
        examples=ExampleConfig(text_length=8),
        batch_size=16,
        num_threads=0,
    )


def test_pictures_of_two_sources_with_equal_names_have_ids_of_their_own(
    config: DataConfig, tokenizer: WordPieceTokenizer
) -> None:
    stream, evaluation = (kind(config, tokenizer, name="s", seed=0) for kind in (Stream, EvaluationSet))
    found = {
        (made.ref.source, made.example.key): int(made.example.arrays["example_id"])
        for step in range(3)
        for made in stream.batch(step).rows
    }
    assert len({key for _, key in found}) < len(found) == 12
    assert len(set(found.values())) == 12
    again = {
        (evaluation.source_of(index), evaluation[index].key): int(evaluation[index].arrays["example_id"])
        for index in range(len(evaluation))
    }
    assert again == found


def test_a_source_alone_has_the_ids_that_it_always_had(config: DataConfig, tokenizer: WordPieceTokenizer) -> None:
    """Runs that go on draw what is masked from them."""
    alone = dataclasses.replace(config, sources={"cc3m": config.sources["cc3m"]})
    example = EvaluationSet(alone, tokenizer, name="s", seed=0)[0]
    assert example.key == "00000/000000000"
    assert int(example.arrays["example_id"]) == 3694644406607035546
