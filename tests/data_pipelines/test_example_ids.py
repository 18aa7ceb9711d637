"""Example ids: equal for the same image of one source, different otherwise."""

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
    """Write two data sets whose tars and samples have equal names, as from img2dataset."""
    sources = {}
    for place, name in enumerate(("cc3m", "laion")):
        (tmp_path / name).mkdir()
        img2dataset(tmp_path / name / "00000.tar", 4 + 4 * place)
        sources[name] = SourceConfig(format="webdataset", path=str(tmp_path / name))
    return DataConfig(
        sources=sources, visual=VisualConfig(image_size=8), examples=ExampleConfig(text_length=8), batch_size=16,
        num_threads=0,
    )  # fmt: skip


def test_images_of_two_sources_with_equal_names_have_different_ids(
    config: DataConfig, tokenizer: WordPieceTokenizer
) -> None:
    stream, evaluation = (kind(config, tokenizer, name="s", seed=0) for kind in (Stream, EvaluationSet))
    ids = {
        (examples.ref.source, examples.example.key): int(examples.example.arrays["example_id"])
        for step in range(3)
        for examples in stream.batch(step).rows
    }
    assert len({key for _, key in ids}) < len(ids) == 12
    assert len(set(ids.values())) == 12
    again = {
        (evaluation.source_of(index), evaluation[index].key): int(evaluation[index].arrays["example_id"])
        for index in range(len(evaluation))
    }
    assert again == ids


def test_the_ids_of_a_single_source_are_stable(config: DataConfig, tokenizer: WordPieceTokenizer) -> None:
    """Resumed runs draw masked words by them."""
    alone = dataclasses.replace(config, sources={"cc3m": config.sources["cc3m"]})
    example = EvaluationSet(alone, tokenizer, name="s", seed=0)[0]
    assert example.key == "00000/000000000"
    assert int(example.arrays["example_id"]) == 3694644406607035546
