"""CLIP, BERT and the release under the names that training code gives them; variants of BERT are errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mplug2_jax.conversion.files.open import open_source
from mplug2_jax.conversion.import_plan import plan_import
from mplug2_jax.conversion.layouts.identify import identify
from mplug2_jax.errors import UserError
from tests.weights import (
    bert_tensors,
    hugging_face_clip,
    official_config,
    official_file,
    openai_clip,
    read_tensors,
    write_checkpoint,
)

SMALL: dict[str, Any] = {
    "openai": openai_clip(64, 1), "hugging_face": hugging_face_clip(64, 1), "bert": bert_tensors(64, 1)
}  # fmt: skip
WITH_HEAD = {f"bert.{name}": value for name, value in SMALL["bert"].items()} | {"classifier.weight": np.zeros((2, 64))}


def add_prefix(tensors: Any, prefix: str) -> Any:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


@pytest.mark.parametrize("prefix", ["module.", "model.", "state_dict.", "module.model._orig_mod.", "0.auto_model."])
@pytest.mark.parametrize("layout", [*SMALL, "with_head", "official"])
def test_a_prefix_of_all_names_is_removed(tmp_path: Path, layout: str, prefix: str) -> None:
    if layout == "official":
        tensors = read_tensors(official_file(tmp_path / "x.safetensors", official_config()))
    else:
        tensors = WITH_HEAD if layout == "with_head" else SMALL[layout]
    plain = identify(write_checkpoint(tmp_path / "plain.pth", tensors))
    detected = identify(write_checkpoint(tmp_path / "prefixed.pth", add_prefix(tensors, prefix)))
    assert (detected.kind, detected.layout) == (plain.kind, plain.layout)
    assert detected.tensors.names() == plain.tensors.names()
    name = detected.tensors.names()[-1]
    np.testing.assert_array_equal(detected.tensors.read(name), plain.tensors.read(name))


@pytest.mark.parametrize("prefix", ["", "visual.", "model.visual."])
def test_openai_s_vision_tower_may_be_alone(tmp_path: Path, prefix: str) -> None:
    tower = {n.removeprefix("visual."): x for n, x in SMALL["openai"].items() if n.startswith("visual.")}
    plan = plan_import([write_checkpoint(tmp_path / "x.safetensors", add_prefix(tower, prefix))])
    assert (plan.title, plan.model_def.config.vision_layers) == ("CLIP (OpenAI)", 1)


def test_heads_of_a_fine_tuned_bert_are_ignored_and_listed(tmp_path: Path) -> None:
    heads = ("classifier.weight", "qa_outputs.bias", "score.weight", "crf.transitions", "pooler.dense.weight")
    tensors = SMALL["bert"] | dict.fromkeys(heads, np.zeros((2, 64), np.float32))
    plan = plan_import([write_checkpoint(tmp_path / "x.safetensors", add_prefix(tensors, "bert."))])
    dispositions = plan.sources[0].dispositions
    assert {dispositions[name][0] for name in heads} == {"ignored"}
    assert dispositions["qa_outputs.bias"][1] == "head of a fine-tuned BERT, which mPLUG-2 does not have"
    attention = "encoder.layer.0.attention.self.distance_embedding.weight"
    for unexpected in (attention, "embeddings.x_position_embeddings.weight"):
        changed = SMALL["bert"] | {unexpected: np.zeros((3, 64), np.float32)}
        with pytest.raises(UserError, match=rf"1 unexpected \({unexpected}\)"):
            plan_import([write_checkpoint(tmp_path / "y.safetensors", changed)])


@pytest.mark.parametrize("family", ["roberta", "model.xlm_roberta", "camembert", "electra", "distilbert", "esm"])
def test_variants_of_bert_are_errors_by_name(tmp_path: Path, family: str) -> None:
    tensors = add_prefix(SMALL["bert"], f"{family}.") | {"cls.x": np.zeros(2)}
    path = write_checkpoint(tmp_path / "x.safetensors", tensors)
    with pytest.raises(UserError, match=rf"x\.safetensors holds weights of {family.rpartition('.')[2]} \("):
        plan_import([path])
    alone = write_checkpoint(tmp_path / "y.safetensors", bert_tensors(64, 1, types=1))
    with pytest.raises(UserError, match=r"token_type_embeddings\.weight has 1 row, BERT's has 2: this is RoBERTa"):
        plan_import([alone])


def test_one_tensor_under_two_names_is_an_error(tmp_path: Path) -> None:
    duplicated = SMALL["bert"] | add_prefix(SMALL["bert"], "bert.")
    with pytest.raises(UserError, match=r"the same tensor as .* and as .*; remove one of them"):
        identify(write_checkpoint(tmp_path / "x.safetensors", duplicated))


TRAINING_CHECKPOINTS: dict[str, Any] = {
    "DDP": lambda tensors: add_prefix(tensors, "module."),
    "Lightning": lambda tensors: {
        "epoch": 3, "pytorch-lightning_version": "2.5.0", "state_dict": add_prefix(tensors, "model."),
        "hyper_parameters": {"lr": 1e-4, "betas": (0.9, 0.98), "name": "x"}, "hparams_name": "kwargs",
        "optimizer_states": [{"state": {0: {"exp_avg": np.ones(2)}}, "param_groups": [{"lr": 1e-4}]}],
        "callbacks": {"ModelCheckpoint": {"best_model_score": np.ones(())}}, "loops": {"fit_loop": {"state_dict": {}}},
    },
    "DeepSpeed": lambda tensors: {
        "module": tensors, "buffer_names": ["x"], "optimizer": None, "sparse_tensor_module_names": {"a"},
        "ds_config": {"zero_optimization": {"stage": 2}}, "ds_version": "0.15", "dp_world_size": 8,
    },
    "open_clip": lambda tensors: {
        "epoch": 32, "name": "ViT-B-32", "state_dict": add_prefix(tensors, "module."), "optimizer": {"state": {}},
        "scaler": {"scale": 65536.0},
    },
}  # fmt: skip
"""Checkpoints as DDP, Lightning, DeepSpeed and open_clip lay them out, with arrays in place of tensors."""


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("library", TRAINING_CHECKPOINTS)
@pytest.mark.parametrize("layout", SMALL)
def test_checkpoints_of_training_libraries_hold_the_plain_tensors(
    tmp_path: Path, layout: str, library: str, legacy: bool
) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed here")

    def to_torch(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: to_torch(child) for name, child in node.items()}
        if isinstance(node, list):
            return [to_torch(child) for child in node]
        return torch.from_numpy(node.copy()) if isinstance(node, np.ndarray) else node

    content = to_torch(TRAINING_CHECKPOINTS[library](SMALL[layout]))
    torch.save(content, tmp_path / "last.ckpt", _use_new_zipfile_serialization=not legacy)
    plain, detected = identify(write_checkpoint(tmp_path / "p" / "x.pth", SMALL[layout])), identify(tmp_path)
    assert (detected.kind, detected.layout) == (plain.kind, plain.layout)
    assert detected.tensors.names() == plain.tensors.names()
    for name in plain.tensors.names():
        np.testing.assert_array_equal(detected.tensors.read(name), plain.tensors.read(name))


def test_weights_beside_lightning_s_model_are_listed(tmp_path: Path) -> None:
    extra = {"criterion.weight": np.zeros(3, np.float32)}
    bert = write_checkpoint(tmp_path / "bert.ckpt", add_prefix(SMALL["bert"], "model.") | extra)
    assert plan_import([bert]).sources[0].dispositions["criterion.weight"][0] == "ignored"
    clip = write_checkpoint(tmp_path / "clip.ckpt", add_prefix(SMALL["openai"], "model.") | extra)
    with pytest.raises(UserError, match=r"1 unexpected \(criterion\.weight\)"):
        plan_import([clip])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vision_model.embeddings.patch_embedding.bias", "SigLIP, whose tower has no class token"),
        ("module.visual.trunk.pos_embed", "a tower of timm: SigLIP's has no class token"),
        ("visual.blocks.0.attn.q_bias", "EVA-CLIP, "),
        ("visual.layer1.0.conv1.weight", "a CLIP with a ResNet, which has no patches"),
        ("visual.attn_pool.query", "CoCa, "),
    ],
)
def test_towers_that_do_not_map_are_errors_with_the_reason(tmp_path: Path, name: str, message: str) -> None:
    layout = "hugging_face" if name.startswith("vision_model") else "openai"
    prefix = "module." if name.startswith("module.") else ""
    tensors = add_prefix(SMALL[layout], prefix) | {name: np.zeros(2, np.float32)}
    with pytest.raises(UserError) as error:
        plan_import([write_checkpoint(tmp_path / "x.pth", tensors)])
    assert f"x.pth holds weights of {message}" in str(error.value)


@pytest.mark.parametrize("layout", ["openai", "hugging_face"])
def test_a_tower_with_wider_mlps_is_an_error(tmp_path: Path, layout: str) -> None:
    wider = {
        name: np.zeros((320, *value.shape[1:]), np.float32) if "mlp.c_fc" in name or "mlp.fc1" in name else value
        for name, value in SMALL[layout].items()
    }
    with pytest.raises(UserError, match=r"has 320 rows, expected 4 x 64: .* as ViT-g and ViT-bigG have"):
        plan_import([write_checkpoint(tmp_path / "x.pth", wider)])


def test_a_bert_without_a_position_table_is_an_error(tmp_path: Path) -> None:
    tensors = {name: value for name, value in SMALL["bert"].items() if "position" not in name}
    with pytest.raises(UserError, match=r"is not a BERT, .* \('embeddings\.position_embeddings\.weight'\)"):
        plan_import([write_checkpoint(tmp_path / "x.pth", tensors)])


def test_weights_that_zero_stage_3_divided_are_an_error(tmp_path: Path) -> None:
    tensors = dict.fromkeys(SMALL["bert"], np.zeros(0, np.float32)) | {"embeddings.position_ids": np.arange(16)}
    with pytest.raises(UserError, match=r"tensors are empty .* ZeRO stage 3, .* merge these with its zero_to_fp32\.py"):
        plan_import([write_checkpoint(tmp_path / "mp_rank_00_model_states.pt", tensors)])


@pytest.mark.parametrize(
    "name",
    ["open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "epoch_3.pt",
     "mp_rank_00_model_states.pt"],
)  # fmt: skip
def test_open_clip_s_file_names_are_recognized_in_a_folder(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path / name, {"x": np.ones(2, np.float32)})
    assert open_source(tmp_path).names() == ["x"]


def test_a_folder_with_several_files_needs_a_known_name(tmp_path: Path) -> None:
    for name in ("epoch_1.pt", "epoch_2.pt"):
        write_checkpoint(tmp_path / name, {name: np.ones(2, np.float32)})
    message = r"holds 2 files of weights \(epoch_1\.pt, epoch_2\.pt\); give the path of one of them"
    with pytest.raises(UserError, match=message):
        open_source(tmp_path)
    write_checkpoint(tmp_path / "open_clip_pytorch_model.bin", {"x": np.ones(2, np.float32)})
    write_checkpoint(tmp_path / "model.safetensors", {"y": np.ones(2, np.float32)})
    assert open_source(tmp_path).names() == ["y"]
