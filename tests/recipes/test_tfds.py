"""Recipes on data sets of TFDS: from folders with its names, versions, splits and class names to batches."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.loader import EvaluationSet, Stream
from data_pipelines.tokenizers import SPECIAL_TOKENS, WordPieceTokenizer
from mplug2_jax.config import build, load_recipe, shipped_recipes
from mplug2_jax.recipes.base import read_class_names
from mplug2_jax.training.config import RunConfig
from tests.data_pipelines.sources import tfds_builders

RECIPES = sorted(
    name for name, path in shipped_recipes().items() if path.parent.name == "tasks" and "TFDS" in path.read_text()
)
TOKENIZER = WordPieceTokenizer([*SPECIAL_TOKENS, "a", "photo"])
CLASSES = {"cifar100": 100, "dtd": 47, "flowers102": 102, "food101": 101, "pets": 37, "ucf101": 101}


def prepare(folder: Path, splits: set[str], kind: str, num_classes: int) -> None:
    """Prepare a data set of 2 classes, and name it, its splits and its classes as one of TFDS."""
    builder = tfds_builders.Ucf101 if kind == "video" else tfds_builders.Digits
    prepared = Path(builder(data_dir=folder.parent / "made", file_format="array_record").data_dir)
    builder(data_dir=folder.parent / "made", file_format="array_record").download_and_prepare()
    if kind == "video":
        tfds_builders.name_as_video(prepared)
    folder.parent.mkdir(parents=True, exist_ok=True)
    prepared.rename(folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    (train,) = info["splits"]
    info["splits"] = [train | {"name": name} for name in sorted(splits)]
    (shard,) = folder.glob("*-train.array_record*")
    for name in splits - {"train"}:
        (folder / shard.name.replace("train", name)).write_bytes(shard.read_bytes())
    (folder / "dataset_info.json").write_text(json.dumps(info))
    labels = folder / "label.labels.txt"
    names = [*labels.read_text().split(), *(f"other_kind_{i}" for i in range(num_classes - 2))]
    labels.write_text("\n".join(names))
    features = json.loads((folder / "features.json").read_text())
    features["featuresDict"]["features"]["label"]["classLabel"]["numClasses"] = str(num_classes)
    (folder / "features.json").write_text(json.dumps(features))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_reads_its_data_set(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLUG2_DATA", str(tmp_path))
    config = build(RunConfig, load_recipe(f"{recipe}:tiny"))
    (train,), (evaluation,) = config.streams.values(), config.evaluations.values()
    (source,), (held,) = train.data.sources.values(), evaluation.data.sources.values()
    prepare(Path(source.path), {source.split, held.split}, source.kind, CLASSES[recipe])
    config = build(RunConfig, load_recipe(f"{recipe}:tiny"))
    (train,), (evaluation,) = config.streams.values(), config.evaluations.values()
    assert (config.model.num_classes, len(train.data.examples.classes)) == (CLASSES[recipe],) * 2
    batch = Stream(train.data, TOKENIZER, name="set", seed=0).batch(0)
    assert set(batch.arrays["label"].tolist()) <= {0, 1}
    assert batch.arrays["frames"].shape[1] == (1 if source.kind == "image" else train.data.visual.num_frames)
    batches: list[Any] = list(EvaluationSet(evaluation.data, TOKENIZER, name="set", seed=0).batches())
    assert sum(len(batch.examples) for batch in batches) == (12 if source.kind == "image" else 4)
    assert not any(batch.bad_records for batch in batches)


def test_every_recipe_has_its_number_of_classes() -> None:
    assert list(CLASSES) == RECIPES


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("pink_primrose", "pink primrose"), ("ApplyEyeMakeup", "apply eye makeup"), ("YoYo", "yo yo"),
        ("baked_alaska", "baked alaska"), ("boxer", "boxer"), ("Abyssinian", "abyssinian"), ("MRI", "MRI"),
    ],
)  # fmt: skip
def test_names_of_classes_are_words(
    label: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("MPLUG2_DATA", str(tmp_path))
    (tmp_path / "label.labels.txt").write_text(f"{label}\n3\n")
    assert read_class_names("label.labels.txt", 2) == ((label, "3"), (name, "3"))
