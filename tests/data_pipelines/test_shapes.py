"""Batches have the shapes and dtypes that their config declares."""

import dataclasses

import pytest

from data_pipelines.config import DataConfig, ExampleConfig
from data_pipelines.digitworld import vocabulary_texts
from data_pipelines.loader import EvaluationSet, Stream
from data_pipelines.tokenizers import train_wordpiece
from mplug2_jax.config import build, load_recipe
from mplug2_jax.training.config import RunConfig

TOKENIZER = train_wordpiece(vocabulary_texts(60), 160)
SPECS = (
    "demo", "pretrain:tiny", "finetune:caption,tiny", "finetune:videoqa,tiny", "released:caption,tiny",
    "released:videoqa,tiny",
)  # fmt: skip


def shapes_of(arrays) -> dict[str, tuple[tuple[int, ...], str]]:
    return {key: (value.shape, value.dtype.name) for key, value in arrays.items()}


def declared_shapes(data: DataConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    return {key: (shape, dtype.__name__.rstrip("_")) for key, (shape, dtype) in data.shapes().items()}


@pytest.mark.parametrize("spec", SPECS)
def test_batches_of_shipped_recipes_have_the_declared_shapes(spec: str) -> None:
    config = build(RunConfig, load_recipe(spec))
    for stream in config.streams.values():
        data = dataclasses.replace(stream.data, batch_size=3)
        assert shapes_of(Stream(data, TOKENIZER, name="s", seed=0).batch(0).arrays) == declared_shapes(data)
    for evaluation in config.evaluations.values():
        data = dataclasses.replace(evaluation.data, batch_size=3)
        arrays = dict(next(iter(EvaluationSet(data, TOKENIZER, name="s", seed=0).batches())).arrays)
        assert arrays.pop("example_mask").shape == (3,)
        assert shapes_of(arrays) == declared_shapes(data)


def test_omitted_fields_have_no_shape() -> None:
    """Check lengths of 0, instructions without texts, and word starts: each is a separate field or none."""
    data = build(RunConfig, load_recipe("demo")).streams["text"].data
    bare = dataclasses.replace(data, examples=ExampleConfig(text="sentence", text_length=9), batch_size=2)
    marked = dataclasses.replace(bare, examples=dataclasses.replace(bare.examples, word_starts=True))
    silent = dataclasses.replace(data, examples=dataclasses.replace(data.examples, instruction_length=0, text_length=0))
    assert set(bare.shapes()) == {"example_id", "text", "text_mask"}
    assert set(marked.shapes()) == {"example_id", "text", "text_mask", "word_starts"}
    assert set(silent.shapes()) == {"example_id", "target", "target_weights"}
    for each in (bare, marked, dataclasses.replace(silent, batch_size=2)):
        assert shapes_of(Stream(each, TOKENIZER, name="s", seed=0).batch(0).arrays) == declared_shapes(each)
