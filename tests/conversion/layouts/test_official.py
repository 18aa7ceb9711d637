"""The official layout: every tensor is mapped or ignored, nothing is loaded in part, and the inverse is exact."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mplug2_jax.conversion.files.sources import TensorSource
from mplug2_jax.conversion.layouts.name_mapping import match_names
from mplug2_jax.conversion.layouts.official import (
    CAPTION_PARTS,
    QUESTION_PARTS,
    canonical_names,
    default_fusion_start,
    load_official,
    map_official_names,
    map_tensors,
    student_name,
    teacher_name,
    to_official,
)
from mplug2_jax.conversion.layouts.official_state import init_tensor, official_state, tied_to
from mplug2_jax.conversion.parity.goldens import load_goldens
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import model_config
from mplug2_jax.model.mplug2 import define_model
from tests.weights import MemorySource


def read_all(source: TensorSource) -> MemorySource:
    return MemorySource({name: source.read(name) for name in source.names()})


@pytest.fixture(scope="module")
def golden(reference: Path):
    return load_goldens(reference / "goldens" / "c1_fc")[1]


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("task", ["caption", "videoqa"])
def test_every_name_and_shape_of_the_release_is_mapped_or_ignored(reference: Path, task: str, size: str) -> None:
    rows = json.loads((reference / f"state_dict_{task}_{size}.json").read_text())
    shapes = {row["name"]: tuple(row["shape"]) for row in rows}
    parts = CAPTION_PARTS if task == "caption" else QUESTION_PARTS
    model_def = define_model(model_config(size), parts)
    start = default_fusion_start(model_def.config)
    assert start == {"base": 9, "large": 18}[size]
    mappings, report = match_names(list(shapes), map_official_names(model_def.config, parts, start))
    assert set(report.rows) == set(shapes)
    assert report.count("tied") == 2
    assert (report.count("unused") > 0) == (task == "videoqa")
    # The converted tensors have exactly as many elements as our model.
    assert sum(int(np.prod(shapes[name])) for name in mappings) == model_def.num_params()


def test_the_inverse_is_equal_to_the_bit(golden) -> None:
    for name, ours in to_official(golden.params, golden.mappings, golden.source):
        np.testing.assert_array_equal(ours, golden.source.read(name), err_msg=name)


def test_the_teacher_has_its_own_values_of_the_same_tensors(golden) -> None:
    tensors = dict(to_official(golden.teacher, golden.mappings, golden.source))
    for name in ("text_encoder.embeddings.word_embeddings.weight", "visn_emb_norm.bias"):
        np.testing.assert_array_equal(tensors[name], golden.source.read(teacher_name(name)))
        assert student_name(teacher_name(name)) == name
        assert not np.array_equal(tensors[name], golden.source.read(name))


def test_missing_and_unexpected_tensors_are_listed_together(golden) -> None:
    source = read_all(golden.source)
    del source.tensors["visn_fc.weight"]
    source.tensors["text_encoder.pooler.dense.weight"] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as error:
        load_official(source, golden.model_def, golden.fusion_start)
    assert "1 missing (visn_fc.weight)" in str(error.value)
    assert "1 unexpected (text_encoder.pooler.dense.weight)" in str(error.value)
    assert "nothing was loaded" in str(error.value)


def test_a_misshapen_tensor_is_named_with_both_shapes(golden) -> None:
    source = read_all(golden.source)
    source.tensors["visn_fc.weight"] = np.zeros((48, 32), np.float32)
    with pytest.raises(UserError, match=r"visn_fc.weight \[48, 32\] does not fit vision_projection/dense/kernel"):
        load_official(source, golden.model_def, golden.fusion_start)


def test_every_parameter_is_filled_once(golden) -> None:
    mappings = map_tensors(golden.model_def.config, QUESTION_PARTS, golden.fusion_start)
    filled = [(mapping.path, mapping.layer) for mapping in mappings]
    assert len(filled) == len(set(filled))
    assert {path for path, _ in filled} == set(flatten_dict(golden.model_def.shapes))


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("task", ["caption", "videoqa"])
def test_a_state_dict_has_the_release_s_names_shapes_dtypes_and_order(reference: Path, task: str, size: str) -> None:
    rows = json.loads((reference / f"state_dict_{task}_{size}.json").read_text())
    config = model_config(size)
    state = official_state(config, default_fusion_start(config), teacher=task == "videoqa")
    ours = [{"name": n, "shape": list(info.shape), "dtype": info.dtype.name} for n, info in state.items()]
    assert ours == [{key: row[key] for key in ("name", "shape", "dtype")} for row in rows]


def test_names_of_pretraining_and_of_wrappers_become_canonical() -> None:
    stored = [
        "module.text_encoder.bert.embeddings.word_embeddings.weight", "module.fusion_encoder.fusion.encoder.layer.0.x",
        "module.fusion_encoder.bert.embeddings.x", "module.text_decoder.bert.encoder.layer.0.x",
        "module.text_encoder_m.bert.encoder.layer.0.x",
    ]  # fmt: skip
    assert canonical_names(stored) == {
        "text_encoder.embeddings.word_embeddings.weight": stored[0],
        "fusion_encoder.encoder.layer.0.x": stored[1],
        "fusion_encoder.embeddings.x": stored[2],
        "text_decoder.bert.encoder.layer.0.x": stored[3],
        "text_encoder_m.encoder.layer.0.x": stored[4],
    }
    with pytest.raises(UserError, match="the same tensor as"):
        canonical_names(["fusion_encoder.bert.x", "fusion_encoder.fusion.x"])


def test_ignored_tensors_are_initialized_as_in_the_release() -> None:
    config = model_config("base")
    state = official_state(config, default_fusion_start(config), teacher=True)

    def init(name: str) -> np.ndarray:
        return init_tensor(name, state[name])

    assert init("text_encoder.embeddings.position_ids").tolist() == [list(range(512))]
    assert (init("fusion_encoder.encoder.layer.0.output.LayerNorm.weight") == 1).all()
    assert (init("visual_encoder.ln_final.weight") == 1).all()
    assert (init("fusion_encoder.encoder.layer.0.output.dense.bias") == 0).all()
    assert init("visual_encoder.logit_scale") == np.float32(np.log(1 / 0.07))
    stds = {
        "text_decoder.bert.encoder.layer.10.latents": 1.0,
        "text_encoder.encoder.layer.10.intermediate_vision.dense.weight": 0.02,
        "visual_encoder.visual.proj": 768**-0.5,
        "visual_encoder.positional_embedding": 0.01,
        "visual_encoder.transformer.resblocks.3.attn.in_proj_weight": 512**-0.5,
        "visual_encoder.transformer.resblocks.3.mlp.c_fc.weight": 1024**-0.5,
        "visual_encoder.transformer.resblocks.3.mlp.c_proj.weight": 512**-0.5 * 24**-0.5,
    }
    for name, std in stds.items():
        assert init(name).std() == pytest.approx(std, rel=0.05), name
    # The release copies its teacher from the student.
    name = "visual_encoder.text_projection"
    np.testing.assert_array_equal(init(name), init(teacher_name(name)))
    assert tied_to("text_decoder_m.cls.predictions.decoder.bias") == "text_decoder_m.cls.predictions.bias"
    assert tied_to("text_decoder.cls.predictions.bias") is None
