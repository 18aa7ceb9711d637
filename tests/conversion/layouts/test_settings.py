"""Settings next to a CLIP or a BERT set what shapes do not determine, or are errors; assumptions are reported."""

from pathlib import Path
from typing import Any

import pytest

from mplug2_jax.conversion.import_plan import ImportPlan, plan_import
from mplug2_jax.conversion.import_weights import run_import
from mplug2_jax.conversion.report import read_report
from mplug2_jax.errors import UserError
from tests.weights import bert_tensors, hugging_face_clip, openai_clip, write_checkpoint

BERT: dict[str, Any] = {"model_type": "bert", "hidden_size": 128, "num_attention_heads": 4, "hidden_act": "gelu"}
TOWER: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4, "hidden_act": "gelu", "patch_size": 8}
OPEN_CLIP: dict[str, Any] = {"width": 128, "head_width": 32, "layers": 2, "patch_size": 8}


def make_plan(folder: Path, tensors: Any, settings: Any, name: str = "model.safetensors") -> ImportPlan:
    write_checkpoint(folder / name, tensors, settings)
    return plan_import([folder])


@pytest.mark.parametrize(
    ("settings", "heads"),
    [
        ({"config.json": BERT}, 4),
        ({"bert_config.json": BERT}, 4),  # in Google's archives
        ({"config.json": BERT | {"hidden_act": "gelu_python", "layer_norm_eps": 1e-12}}, 4),
        ({"config.json": {"vision_config": TOWER}, "bert_config.json": BERT}, 4),  # the first is a tower's
        ({"config.json": {"learning_rate": 1.0}}, 2),  # of something else
        ({}, 2),
    ],
)
def test_a_bert_has_the_heads_in_its_settings(tmp_path: Path, settings: Any, heads: int) -> None:
    plan = make_plan(tmp_path, bert_tensors(), settings)
    assert plan.model_def.config.heads == heads
    assert bool(plan.notes) == (heads == 2)


def test_absent_settings_of_a_bert_are_the_library_s_defaults_and_reported(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, bert_tensors(384), {"config.json": {"model_type": "bert", "num_attention_heads": None}})
    assert plan.model_def.config.heads == 12
    assert plan.notes[0] == "num_attention_heads=12: not in config.json, the library's default"


def test_a_cased_bert_is_reported(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, bert_tensors(), {"config.json": BERT, "tokenizer_config.json": {"do_lower_case": False}})
    assert [note.partition(":")[0] for note in plan.notes] == [
        "tokenizer_config.json has do_lower_case=false, but our word pieces are lower case"
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported, expected 'gelu'"),
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new' is not"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05 is not"),
        ({"is_decoder": True}, "is_decoder=True is not"),
        ({"model_type": "xlm-roberta"}, "model_type='xlm-roberta' is not"),
        ({"num_attention_heads": 3}, "num_attention_heads=3 does not divide the width 128"),
        ({"num_attention_heads": "4"}, "num_attention_heads='4' does not divide"),
        ({"hidden_size": 256}, "hidden_size=256, but the weights have 128"),
        ({"num_hidden_layers": 12}, "num_hidden_layers=12, but the weights have 2"),
    ],
)
def test_unsupported_settings_of_a_bert_are_errors_with_the_field(tmp_path: Path, changed: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        make_plan(tmp_path, bert_tensors(), {"config.json": BERT | changed})
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: {message}")


@pytest.mark.parametrize(
    ("openai", "settings", "heads", "activation"),
    [
        (False, {"config.json": {"vision_config": TOWER}}, 4, "gelu"),
        (False, {"config.json": TOWER | {"hidden_act": "quick_gelu"}}, 4, "quick_gelu"),  # of a tower alone
        (False, {"config.json": {"vision_config": TOWER, "vision_config_dict": {"num_attention_heads": 8}}}, 8, "gelu"),
        (False, {"config.json": {"vision_config": {"patch_size": 8, "num_attention_heads": 2}}}, 2, "quick_gelu"),
        (False, {"open_clip_config.json": {"model_cfg": {"vision_cfg": OPEN_CLIP}}}, 4, "gelu"),
        (True, {"open_clip_config.json": {"model_cfg": {"vision_cfg": OPEN_CLIP}}}, 4, "gelu"),
        (True, {"open_clip_config.json": {"vision_cfg": OPEN_CLIP, "quick_gelu": True}}, 4, "quick_gelu"),
        (True, {"open_clip_config.json": {"vision_cfg": {"width": 128}}}, 2, "gelu"),  # heads of 64 are its own
        (True, {"config.json": {"vision_config": TOWER}}, 4, "gelu"),
        (True, {"config.json": TOWER, "open_clip_config.json": {"vision_cfg": {"width": 128}}}, 2, "gelu"),
        (False, {"config.json": TOWER, "preprocessor_config.json": {"image_mean": [0.481, 0.458, 0.408]}}, 4, "gelu"),
        (True, {"config.json": BERT}, 2, "quick_gelu"),  # of a BERT
        (True, {}, 2, "quick_gelu"),
    ],
)  # fmt: skip
def test_a_tower_has_the_heads_and_the_activation_in_its_settings(
    tmp_path: Path, openai: bool, settings: Any, heads: int, activation: str
) -> None:
    plan = make_plan(tmp_path, openai_clip() if openai else hugging_face_clip(), settings)
    config = plan.model_def.config
    assert (config.vision_heads, config.vision_activation) == (heads, activation)
    assumptions = [note for note in plan.notes if "next to" in note]
    assert bool(assumptions) == (not settings or ("config.json" in settings and settings["config.json"] is BERT))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("config.json", {"vision_config": TOWER | {"hidden_act": "relu"}}, "hidden_act='relu' is not"),
        ("config.json", {"vision_config": TOWER | {"layer_norm_eps": 1e-6}}, "layer_norm_eps=1e-06 is not"),
        ("config.json", {"vision_config": TOWER | {"patch_size": 16}}, "patch_size=16, but the weights have 8"),
        ("open_clip_config.json", {"vision_cfg": OPEN_CLIP | {"norm_kwargs": {"eps": 1e-6}}}, "layer_norm_eps=1e-06"),
        ("open_clip_config.json", {"vision_cfg": OPEN_CLIP | {"head_width": "x"}}, "num_attention_heads='x' does not"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, "image_mean=[0.5, 0.5, 0.5] is not"),
        ("open_clip_config.json", {"vision_cfg": {}, "preprocess_cfg": {"std": [1, 1, 1]}}, "image_std=[1, 1, 1] is"),
        ("open_clip_config.json", {"vision_cfg": OPEN_CLIP | {"act_kwargs": {"approximate": "tanh"}}}, "act_kwargs={"),
        (
            "open_clip_config.json",
            {"vision_cfg": OPEN_CLIP | {"final_ln_after_pool": True}},
            "final_ln_after_pool=True",
        ),
        ("open_clip_config.json", {"vision_cfg": {}}, "hidden_size=768, but the weights have 128"),
    ],
)
def test_unsupported_settings_of_a_tower_are_errors_with_the_field(
    tmp_path: Path, name: str, settings: Any, message: str
) -> None:
    with pytest.raises(UserError) as error:
        make_plan(tmp_path, openai_clip(), {name: settings})
    assert str(error.value).startswith(f"{tmp_path / name}: {message}")


def test_without_settings_head_widths_are_the_usual_ones_or_an_error(tmp_path: Path) -> None:
    huge = make_plan(tmp_path / "huge", openai_clip(1280, 1), {})
    assert huge.model_def.config.vision_heads == 16  # of 80 columns, as all ViT-H/14
    with pytest.raises(UserError, match=r"the width 100 is not a multiple of the head width 64; put the config\.json"):
        make_plan(tmp_path / "narrow", bert_tensors(100), {})


def test_damaged_settings_are_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model.safetensors", bert_tensors())
    for content in ("{", "[" * 100_000):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
            plan_import([tmp_path])


def test_the_report_lists_assumptions(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "ViT.pt", openai_clip(64, 1))
    report = run_import(plan_import([path]), tmp_path / "ours")
    message = "head width 64, QuickGELU: assumed without config.json or open_clip_config.json next to ViT.pt"
    assert f"note: {message}" in report.summary()
    assert read_report(tmp_path / "ours").notes == [message]
    assert message in (tmp_path / "ours" / "conversion-report.html").read_text()
