"""Checkpoint metadata: read as older versions wrote them; what changed in the data is named when a run resumes."""

import dataclasses
import json
from pathlib import Path

import pytest

from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig
from data_pipelines.loader import Stream
from mplug2_jax.config import build, to_dict
from mplug2_jax.errors import UserError
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints, DamagedCheckpointError
from mplug2_jax.training.checkpoint.metadata import DataPosition, ModelMetadata
from mplug2_jax.training.config import CheckpointConfig
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
    """Return the position of step 7 as a checkpoint gives it back."""
    return build(DataPosition, json.loads(json.dumps(to_dict(data_position(7, streams)))))


def test_the_same_data_is_accepted_with_or_without_fingerprints(tmp_path: Path) -> None:
    position = saved(stream(table(tmp_path / "a.jsonl", "one", "two")))
    check_data_unchanged(position, stream(tmp_path / "a.jsonl"))
    old = {key: value for key, value in position.streams["words"].items() if key != "sources"}
    check_data_unchanged(dataclasses.replace(position, streams={"words": old}), stream(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["one"], r"step 7 was saved: stream 'words' had 2 records, now 1\. The resumed run would read other examples"),
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


def test_a_moved_source_and_what_was_changed_on_purpose_are_accepted(tmp_path: Path) -> None:
    position = saved(stream(table(tmp_path / "a.jsonl", "one", "two")))
    (tmp_path / "moved").mkdir()
    moved = table(tmp_path / "moved" / "a.jsonl", "one", "two")
    check_data_unchanged(position, stream(moved), {"streams.words.data.sources.a.path"})
    larger = stream(moved, table(tmp_path / "b.jsonl", "three"), batch_size=4)
    changed = {"streams.words.data.batch_size", "streams.words.data.sources.b.format"}
    check_data_unchanged(position, larger, changed)
    for field, sentence in zip(sorted(changed), ("had 0 records, now 1", "had batch_size 2, now 4"), strict=True):
        with pytest.raises(UserError, match=sentence):
            check_data_unchanged(position, larger, {field})
    table(moved, "one", "six")
    with pytest.raises(UserError, match="had other contents"):
        check_data_unchanged(position, stream(moved), {"streams.words.data.sources.a.path"})


def test_of_several_sources_the_one_that_changed_is_named(tmp_path: Path) -> None:
    files = (table(tmp_path / "a.jsonl", "one", "two"), table(tmp_path / "b.jsonl", "three"))
    position = saved(stream(*files))
    table(files[1], "three", "four")
    with pytest.raises(UserError, match=r": source 'b' of stream 'words' had 1 records, now 2\."):
        check_data_unchanged(position, stream(*files))


OLDEST = '{"format": 1, "position": {"step": 40, "streams": {"text": {"batch_size": 8, "seed": 0, "source_size": 10}}}}'
OLD = """{"format": 3, "position": {"step": 40, "streams": {"text": {"seed": 0, "batch_size": 8,
"records": {"digits": 10}, "sources": {}}}, "offsets": [[20, 3], [30, 7]], "recent": [4.0625, 3.999999523162842]},
"model": {"config": {"vision_width": 32, "vision_layers": 1, "vision_heads": 2, "image_size": 16,
"patch_size": 8, "width": 32, "heads": 2, "mlp_width": 64, "text_layers": 1, "universal_layers": 1, "num_latents": 4,
"fusion_layers": 1, "fusion_stride": 1, "decoder_layers": 1, "vocab_size": 256, "max_positions": 64,
"contrastive_width": 16, "attention_dropout": 0.0, "dtype": "float32"}, "parts": ["text", "universal", "mlm"],
"origin": {"url": "x", "size": 3}, "lora_scale": 2.0}, "digests": {"params/x": 7}}"""


def reader_of(folder: Path, metadata: str) -> Checkpoints:
    """Return a reader of a step 40 that is metadata alone."""
    (folder / "40" / "meta").mkdir(parents=True)
    (folder / "40" / "state").mkdir()
    (folder / "40" / "meta" / "metadata").write_text(metadata)
    return Checkpoints(folder, CheckpointConfig(), read_only=True)


def test_metadata_of_older_versions_are_read(tmp_path: Path) -> None:
    text = {"batch_size": 8, "seed": 0, "source_size": 10}
    assert reader_of(tmp_path / "oldest", OLDEST)._read_position(40) == DataPosition(40, {"text": text})
    reader = reader_of(tmp_path / "old", OLD)
    position = reader._read_position(40)
    assert position == DataPosition(
        40, {"text": {"seed": 0, "batch_size": 8, "records": {"digits": 10}, "sources": {}}},
        ((20, 3), (30, 7)), (4.0625, 3.999999523162842),
    )  # fmt: skip
    assert position.batch_index(41) == 47
    model = reader.model_metadata()
    assert (model.config.width, model.parts, model.origin, model.lora_scale) == (
        32, ("text", "universal", "mlm"), {"url": "x", "size": 3}, 2.0
    )  # fmt: skip
    written = json.loads(json.dumps({"format": 3, "position": to_dict(position), "model": to_dict(model)}))
    old = json.loads(OLD)
    assert written["position"] == old["position"]
    assert {name: written["model"]["config"][name] for name in old["model"]["config"]} == old["model"]["config"]
    assert build(ModelMetadata, {k: v for k, v in old["model"].items() if k != "lora_scale"}).lora_scale == 0.0


@pytest.mark.parametrize("position", ["[]", '{"step": "4", "streams": {}}', '{"step": 40}', '{"stp": 1}'])
def test_damaged_metadata_are_named(position: str, tmp_path: Path) -> None:
    reader = reader_of(tmp_path, f'{{"format": 3, "position": {position}}}')
    with pytest.raises(DamagedCheckpointError, match=r"40 is incomplete: meta/metadata is (missing or )?damaged"):
        reader._read_position(40)
