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
    assert (plan.title, plan.definition.config.vision_layers) == ("CLIP (OpenAI)", 1)


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


@pytest.mark.parametrize(
    "name",
    ["open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "epoch_3.pt"],
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
