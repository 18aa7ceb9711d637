"""Sizes: read strictly, and refused in a sentence when they do not fit."""

import dataclasses
import json

import pytest

from mplug2_jax.conversion.torch_runtime.config import SIZES, read_config
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import SpecialTokens, model_config


@pytest.mark.parametrize("size", ["base", "large"])
def test_the_tables_are_those_of_our_model(size):
    ours = dataclasses.asdict(model_config(size))
    theirs = dataclasses.asdict(SIZES[size])
    assert theirs.pop("fusion_start") == ours["text_layers"] + ours["universal_layers"] - ours["fusion_layers"]
    assert (theirs.pop("bos_token_id"), theirs.pop("eos_token_id")) == (SpecialTokens.begin, SpecialTokens.end)
    assert theirs == {name: ours[name] for name in theirs}


def test_a_file_gives_back_the_sizes(tmp_path, small):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(small(fusion_stride=1))))
    assert read_config(path) == small(fusion_stride=1)


@pytest.mark.parametrize(
    ("changed", "said"),
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
def test_sizes_that_do_not_fit_are_refused(small, tmp_path, changed, said):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(small()) | changed))
    with pytest.raises(UserError) as error:
        read_config(path)
    assert str(error.value) == f"{path}: {said}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "holds a list, expected an object"),
        ('{"widht": 3}', "widht is not a size of the model: did you mean 'width'?"),
        ('{"width": 48}', "lacks vision_width, vision_layers,"),
    ],
)
def test_files_that_hold_no_sizes_are_refused(tmp_path, text, said):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        read_config(path)
    assert str(path) in str(error.value)


def test_sizes_are_checked_without_a_file_too(small):
    with pytest.raises(UserError, match=r"^vision_width=33 is not a multiple of vision_heads=2$"):
        small(vision_width=33)


def test_layers_that_mix_are_every_stride_th_but_the_first(small):
    assert small(fusion_layers=7, fusion_stride=3).joint_attention_layers == (3, 6)
    assert small(fusion_layers=3, fusion_stride=1).joint_attention_layers == (1, 2)
    assert small(fusion_layers=3).joint_attention_layers == ()
