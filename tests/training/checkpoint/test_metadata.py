"""A position means the same examples for ever: what changed in the data is named, and older versions' are taken."""

import dataclasses
import json
from pathlib import Path

import pytest

from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig
from data_pipelines.loader import Stream
from mplug2_jax.errors import UserError
from mplug2_jax.training.checkpoint.metadata import DataPosition
from mplug2_jax.training.loop import check_data_unchanged, data_position
from mplug2_jax.training.workdir import load_or_train_tokenizer
from tests.runs import small_run


def stream(*files: Path, batch_size: int = 2) -> dict[str, Stream]:
    sources = {file.stem: SourceConfig(format="annotations", path=str(file), kind="text") for file in files}
    data = DataConfig(sources=sources, examples=ExampleConfig(text="sentence", text_length=8), batch_size=batch_size)
    return {"words": Stream(data, load_or_train_tokenizer(small_run().tokenizer), name="words", seed=0)}


def table(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def saved(streams: dict[str, Stream]) -> DataPosition:
    """The position of step 7 as a checkpoint gives it back."""
    return DataPosition.from_json(json.loads(json.dumps(data_position(7, streams).to_json()))["position"])


def test_the_same_data_and_those_of_older_versions_go_on(tmp_path: Path) -> None:
    position = saved(stream(table(tmp_path / "a.jsonl", "one", "two")))
    check_data_unchanged(position, stream(tmp_path / "a.jsonl"))
    old = {key: value for key, value in position.streams["words"].items() if key != "sources"}
    check_data_unchanged(dataclasses.replace(position, streams={"words": old}), stream(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["one"], r"step 7 was saved: stream 'words' had 2 records, now 1\. The run would go on with other examples"),
        (["one", "twenty"], r"stream 'words' had 1 file with 32 bytes, now 1 file with 35 bytes\."),
        (["one", "six"], r"stream 'words' had other contents in its 1 file with 32 bytes\."),
        (["two", "one"], r"stream 'words' had other contents"),
    ],
)
def test_a_change_is_one_sentence(texts: list[str], sentence: str, tmp_path: Path) -> None:
    position = saved(stream(table(tmp_path / "a.jsonl", "one", "two")))
    table(tmp_path / "a.jsonl", *texts)
    with pytest.raises(UserError, match=sentence):
        check_data_unchanged(position, stream(tmp_path / "a.jsonl"))


def test_of_several_sources_the_one_that_changed_is_named(tmp_path: Path) -> None:
    files = (table(tmp_path / "a.jsonl", "one", "two"), table(tmp_path / "b.jsonl", "three"))
    position = saved(stream(*files))
    table(files[1], "three", "four")
    with pytest.raises(UserError, match=r": source 'b' of stream 'words' had 1 records, now 2\."):
        check_data_unchanged(position, stream(*files))
