"""Sizes are read strictly, and clear errors if they do not fit."""

import dataclasses
import json

import pytest

from mplug2_jax.conversion.torch_runtime.config import SIZES, read_config
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import SpecialTokens, model_config


@pytest.mark.parametrize("size", ["base", "large"])
def test_the_size_table_is_that_of_our_model(size):
    ours = dataclasses.asdict(model_config(size))
    runtime_sizes = dataclasses.asdict(SIZES[size])
    assert runtime_sizes.pop("fusion_start") == ours["text_layers"] + ours["universal_layers"] - ours["fusion_layers"]
    tokens = runtime_sizes.pop("bos_token_id"), runtime_sizes.pop("eos_token_id")
    assert tokens == (SpecialTokens.begin, SpecialTokens.end)
    assert runtime_sizes == {name: ours[name] for name in runtime_sizes}


def test_a_file_round_trip_keeps_the_sizes(tmp_path, small):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(small(fusion_stride=1))))
    assert read_config(path) == small(fusion_stride=1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"width": 25}, "width=25 is not a multiple of heads=2"),
        ({"vision_width": 0}, "vision_width=0 must be an integer of at least 1"),
        ({"text_layers": -1}, "text_layers=-1 must be an integer of at least 0"),
        ({"heads": True}, "heads=True must be an integer of at least 1"),
        ({"decoder_layers": 2.0}, "decoder_layers=2.0 must be an integer of at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be a number from 0 to below 1"),
        ({"dropout": float("nan")}, "dropout=nan must be a number from 0 to below 1"),
        ({"temporal_downsampling": 1}, "temporal_downsampling=1 must be true or false"),
        ({"vision_activation": "relu"}, "vision_activation='relu' must be quick_gelu or gelu"),
        ({"eos_token_id": -1}, "eos_token_id=-1 must be an integer of at least 0"),
        ({"image_size": 20}, "image_size=20 is not a multiple of patch_size=8"),
    ],
)
def test_invalid_sizes_are_errors(small, tmp_path, changed, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(small()) | changed))
    with pytest.raises(UserError) as error:
        read_config(path)
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "holds a list, expected an object"),
        ('{"widht": 3}', "widht is not a size of the model: did you mean 'width'?"),
        ('{"width": 48}', "lacks vision_width, vision_layers,"),
    ],
)
def test_files_without_sizes_are_errors(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_config(path)
    assert str(path) in str(error.value)


def test_sizes_are_checked_without_a_file_too(small):
    with pytest.raises(UserError, match=r"^vision_width=33 is not a multiple of vision_heads=2$"):
        small(vision_width=33)


def test_joint_attention_layers_are_every_stride_th_but_the_first(small):
    assert small(fusion_layers=7, fusion_stride=3).joint_attention_layers == (3, 6)
    assert small(fusion_layers=3, fusion_stride=1).joint_attention_layers == (1, 2)
    assert small(fusion_layers=3).joint_attention_layers == ()
