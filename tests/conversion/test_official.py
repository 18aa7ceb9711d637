"""The official layout: every tensor is accounted for, nothing is loaded in part, and the way back is exact."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from mplug2_jax.conversion.goldens import CAPTION_PARTS, QUESTION_PARTS, load_goldens
from mplug2_jax.conversion.official import (
    HostArray,
    TensorSource,
    account_for,
    load_official,
    slots,
    student_name,
    teacher_name,
    to_official,
)
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import model_config
from mplug2_jax.model.mplug2 import define

FUSION_START = {"base": 9, "large": 18}


class Memory:
    """Tensors in memory as a source."""

    def __init__(self, tensors: Mapping[str, HostArray]) -> None:
        self.tensors = dict(tensors)

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str) -> HostArray:
        return self.tensors[name]


def all_of(source: TensorSource) -> Memory:
    return Memory({name: source.read(name) for name in source.names()})


@pytest.fixture(scope="module")
def golden(reference: Path):
    return load_goldens(reference / "goldens" / "c1_fc")[1]


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("task", ["caption", "videoqa"])
def test_every_name_and_shape_of_the_release_is_accounted_for(reference: Path, task: str, size: str) -> None:
    listed = json.loads((reference / f"state_dict_{task}_{size}.json").read_text())
    shapes = {row["name"]: tuple(row["shape"]) for row in listed}
    parts = CAPTION_PARTS if task == "caption" else QUESTION_PARTS
    definition = define(model_config(size), parts)
    wanted, account = account_for(list(shapes), definition, FUSION_START[size])
    assert set(account.rows) == set(shapes)
    assert account.count("tied") == (2 if task == "caption" else 4)
    assert (account.count("aside") > 0) == (task == "videoqa")
    # Together the tensors in use have exactly as many elements as our model.
    assert sum(int(np.prod(shapes[name])) for name in wanted) == definition.count()


def test_the_way_back_gives_every_tensor_to_the_bit(golden) -> None:
    for name, ours in to_official(golden.params, golden.slots, golden.source):
        np.testing.assert_array_equal(ours, golden.source.read(name), err_msg=name)


def test_the_teacher_is_another_set_of_the_same_tensors(golden) -> None:
    back = dict(to_official(golden.teacher, golden.slots, golden.source))
    for name in ("text_encoder.embeddings.word_embeddings.weight", "visn_emb_norm.bias"):
        np.testing.assert_array_equal(back[name], golden.source.read(teacher_name(name)))
        assert student_name(teacher_name(name)) == name
        assert not np.array_equal(back[name], golden.source.read(name))


def test_missing_and_unexpected_tensors_are_listed_together(golden) -> None:
    source = all_of(golden.source)
    del source.tensors["visn_fc.weight"]
    source.tensors["text_encoder.pooler.dense.weight"] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as error:
        load_official(source, golden.definition, golden.fusion_start)
    assert "1 missing (visn_fc.weight)" in str(error.value)
    assert "1 unexpected (text_encoder.pooler.dense.weight)" in str(error.value)
    assert "nothing was loaded" in str(error.value)


def test_a_tensor_of_another_size_is_named_with_both_shapes(golden) -> None:
    source = all_of(golden.source)
    source.tensors["visn_fc.weight"] = np.zeros((48, 32), np.float32)
    with pytest.raises(UserError, match=r"visn_fc.weight \[48, 32\] does not fit vision_projection/dense/kernel"):
        load_official(source, golden.definition, golden.fusion_start)


def test_every_place_of_our_model_is_filled_once(golden) -> None:
    import jax

    filled = [(slot.path, slot.layer) for slot in slots(golden.definition.config, QUESTION_PARTS, golden.fusion_start)]
    assert len(filled) == len(set(filled))
    paths = {
        tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(golden.definition.shapes)
    }
    assert {path for path, _ in filled} == paths
