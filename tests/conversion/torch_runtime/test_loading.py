"""Checkpoints are loaded strictly, every dropped tensor is explained, and files are not trusted."""

import argparse
import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from mplug2_jax.conversion.torch_runtime import SIZES, Caption, VideoQA
from mplug2_jax.conversion.torch_runtime.loading import TIED, read_weights
from mplug2_jax.errors import UserError
from tests.weights import Harmful

WORDS, HEAD = "text_decoder.bert.embeddings.word_embeddings.weight", "text_decoder.cls.predictions.decoder.weight"


def official_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a state dict like the release's: tied tensors twice, buffers, ignored weights."""
    ignored = {
        "text_decoder.bert.embeddings.position_ids": torch.arange(12)[None],
        "visual_encoder.visual.proj": torch.zeros(32, 8),
        "visual_encoder.token_embedding.weight": torch.zeros(9, 8),
        "text_encoder.encoder.layer.3.intermediate_vision.dense.bias": torch.zeros(48),
        "text_decoder.bert.encoder.layer.0.latents": torch.zeros(5, 24),
        "fusion_encoder.encoder.layer.0.output.dense.bias": torch.zeros(24),
    }
    return {name: value.clone() for name, value in model.state_dict().items()} | ignored


@pytest.fixture
def model(small) -> VideoQA:
    return VideoQA(small())


@pytest.fixture
def state(model) -> dict[str, torch.Tensor]:
    return official_state_dict(model)


def load_error(model: VideoQA, state: dict[str, torch.Tensor], **options: bool) -> str:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        model.load_official(state, where="x.pth", **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return str(error.value)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
# Numbers of parameters that the release's loss reaches.
@pytest.mark.parametrize(
    ("kind", "task", "size", "parameters"),
    [
        (Caption, "caption", "base", 256_881_210),
        (Caption, "caption", "large", 621_853_498),
        (VideoQA, "videoqa", "base", 379_952_442),
        (VideoQA, "videoqa", "large", 1_031_533_370),
    ],
)
def test_every_name_and_shape_of_the_release_is_loaded_or_dropped(reference, kind, task, size, parameters) -> None:
    listed = json.loads((reference / f"state_dict_{task}_{size}.json").read_text())
    zero = {"float32": torch.zeros(()), "int64": torch.zeros((), dtype=torch.long)}
    tensors = {row["name"]: zero[row["dtype"]].expand(row["shape"]) for row in listed}
    with torch.device("meta"):
        model = kind(SIZES[size])
    model.load_official(tensors)
    assert set(model.dropped) | set(model.state_dict()) == set(tensors)
    assert not set(model.dropped) & set(model.state_dict())
    assert sum(math.prod(p.shape) for p in model.parameters()) == parameters


def test_dropped_tensors_are_listed_with_reasons(model, state) -> None:
    model.load_official(state)
    assert len(model.dropped) == 6
    assert model.dropped["visual_encoder.visual.proj"] == "CLIP's projection, never called"
    assert model.dropped["fusion_encoder.encoder.layer.0.output.dense.bias"] == "fusion layer below the first in use"


def test_missing_unexpected_and_misshapen_tensors_are_one_error(model, state) -> None:
    del state["visn_fc.weight"], state["visn_fc.bias"]
    state["text_encoder.pooler.dense.weight"] = torch.zeros(3)
    state["visn_emb_norm.weight"] = torch.zeros(25)
    state["visn_emb_norm.bias"] = torch.zeros(24, dtype=torch.long)
    assert load_error(model, state) == (
        "x.pth does not match the model: 2 missing (visn_fc.weight, visn_fc.bias), 1 unexpected "
        "(text_encoder.pooler.dense.weight), 2 of another shape or dtype (visn_emb_norm.weight float32 [25] instead of "
        "[24], visn_emb_norm.bias int64 [24] instead of [24]); nothing was loaded. Check the sizes"
    )


def test_a_caption_model_drops_what_only_questions_need(small, state) -> None:
    model = Caption(small())
    model.load_official(state)
    assert model.dropped["text_encoder.embeddings.LayerNorm.bias"] == "no text in this model"
    assert model.dropped["text_encoder.encoder.layer.1.output.dense.bias"] == "no text in this model"
    assert model.dropped["fusion_encoder.encoder.layer.1.output.dense.bias"] == "no fusion in this model"
    assert "text_encoder.encoder.layer.2.output.dense.bias" not in model.dropped


def test_tied_tensors_are_one_parameter_under_either_name(small, state) -> None:
    for absent in ((), TIED.keys(), TIED.values()):
        model = VideoQA(small())
        model.load_official({name: value for name, value in state.items() if name not in absent})
        decoder = model.text_decoder
        assert decoder.cls.predictions.decoder.weight is decoder.bert.embeddings.word_embeddings.weight
        assert torch.equal(model.state_dict()[HEAD], state[WORDS])
        assert HEAD not in dict(model.named_parameters())


def test_tied_tensors_that_differ_are_an_error(model, state) -> None:
    state[HEAD] = state[HEAD] + 1
    assert load_error(model, state) == f"x.pth: {HEAD} differs from {WORDS}, but the model has one parameter for both"


def test_the_teacher_s_copy_can_be_loaded(small, state) -> None:
    teacher = {}
    for name, value in VideoQA(small()).state_dict().items():
        module, suffix = name.split(".", 1)
        teacher[f"{module}_m.{suffix}"] = value
    for use_teacher, expected, reason in ((False, state, "the teacher's copy"), (True, teacher, "the student's copy")):
        model = VideoQA(small())
        model.load_official(state | teacher, teacher=use_teacher)
        name = "visn_emb_norm_m.weight" if use_teacher else "visn_emb_norm.weight"
        assert torch.equal(model.visn_emb_norm.weight, expected[name])
        assert list(model.dropped.values()).count(reason) == len(model.state_dict())


def test_a_missing_teacher_is_an_error_with_its_names(model, state) -> None:
    assert "missing (visual_encoder_m.visual.class_embedding, " in load_error(model, state, teacher=True)


@pytest.mark.parametrize("top", [None, "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
@pytest.mark.parametrize("zipped", [True, False])
def test_all_forms_of_torch_checkpoints_are_read(tmp_path, small, state, top, prefix, zipped) -> None:
    named = {prefix + name: value for name, value in state.items()}
    path = tmp_path / "checkpoint.pth"
    extra = {"epoch": 3, "args": argparse.Namespace(lr=1e-5), "seen": {"x"}, "dtype": torch.float16}
    content = named if top is None else {top: named, **extra}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    loaded = VideoQA.from_pretrained(path, small())
    assert not loaded.training
    assert torch.equal(loaded.visn_fc.weight, state["visn_fc.weight"])


def test_a_folder_holds_sizes_and_one_file_of_weights(tmp_path, small, state) -> None:
    with pytest.raises(UserError, match=r"holds no weights file; expected one \.safetensors or \.pth file"):
        VideoQA.from_pretrained(tmp_path)
    save_file({name: value.bfloat16() if value.is_floating_point() else value for name, value in state.items()},
              tmp_path / "model.safetensors")  # fmt: skip
    with pytest.raises(UserError, match=r"config\.json does not exist; write one, or pass a config"):
        VideoQA.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(small())))
    model = VideoQA.from_pretrained(str(tmp_path))
    assert model.config == small()
    assert model.visn_fc.weight.dtype == torch.float32
    assert torch.equal(model.visn_fc.weight, state["visn_fc.weight"].bfloat16().float())
    (tmp_path / "other.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds 2 weights files \(model\.safetensors, other\.pth\)"):
        VideoQA.from_pretrained(tmp_path)


def test_code_in_a_checkpoint_is_never_run(tmp_path) -> None:
    path, harm = tmp_path / "bad.pth", tmp_path / "harm"
    torch.save({"model": {"x": torch.zeros(1)}, "extra": Harmful(harm)}, path)
    with pytest.raises(UserError, match=r"bad\.pth is damaged or holds more than tensors and plain values"):
        read_weights(path)
    assert not harm.exists()


@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.5, 0.98])
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_truncated_files_are_errors(tmp_path, state, name, fraction) -> None:
    path = tmp_path / name
    save = torch.save if path.suffix == ".pth" else save_file
    save(state, path)
    path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])
    with pytest.raises(UserError, match=name):
        read_weights(path)


@pytest.mark.parametrize("value", [3, [1, 2], {"model": 3}, {"epoch": 3, "x": torch.zeros(1)}])
def test_files_without_a_state_dict_are_errors(tmp_path, value) -> None:
    torch.save(value, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"odd\.pth holds no state dict: expected named tensors"):
        read_weights(tmp_path / "odd.pth")


def test_a_missing_file_is_named(tmp_path, small) -> None:
    with pytest.raises(UserError, match=r"weights file .*none\.pth does not exist"):
        VideoQA.from_pretrained(tmp_path / "none.pth", small())
