"""CLIP and BERT from the transformers library: our hidden states equal the library's at every layer."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug2_jax.conversion.files.open import open_source
from mplug2_jax.conversion.import_plan import plan_import
from mplug2_jax.conversion.import_weights import run_import
from mplug2_jax.errors import UserError
from mplug2_jax.model.mplug2 import Mplug2, define_model
from mplug2_jax.model.taps import Taps
from mplug2_jax.training.checkpoint.checkpoints import open_checkpoint
from tests.close import assert_close, assert_equal
from tests.hugging_face import bert_model, clip_model
from tests.weights import write_checkpoint

torch = pytest.importorskip("torch", reason="PyTorch is not installed here")
pytest.importorskip("transformers", reason="transformers is not installed here")


def load_model(workdir: Path, **overrides: Any) -> tuple[Mplug2, Any]:
    """Return the model of a checkpoint and its parameters, in float32."""
    checkpoints, step = open_checkpoint(workdir)
    identity = checkpoints.model_metadata(step)
    model_def = define_model(dataclasses.replace(identity.config, dtype="float32", **overrides), identity.parts)
    params, _ = checkpoints.restore_params(model_def.shapes, step)
    checkpoints.close()
    params = jax.tree.map(jnp.asarray, params)
    return model_def.bind(params), params


def openai_state_dict(model: Any) -> dict[str, Any]:
    """Return the tower's state dict in OpenAI's layout: fused projections, and some tensors of the text tower."""
    state = model.state_dict()
    tensors = {
        "visual.class_embedding": state["embeddings.class_embedding"],
        "visual.conv1.weight": state["embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["embeddings.position_embedding.weight"],
        "visual.proj": torch.zeros(128, 16), "logit_scale": torch.tensor(2.0), "text_projection": torch.zeros(8, 16),
        "token_embedding.weight": torch.zeros(5, 8), "transformer.resblocks.0.ln_1.weight": torch.ones(8),
    }  # fmt: skip
    for theirs, ours in (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        tensors |= {f"visual.{ours}.{end}": state[f"{theirs}.{end}"] for end in ("weight", "bias")}
    for i in range(2):
        block, layer = f"visual.transformer.resblocks.{i}", f"encoder.layers.{i}"
        for end, fused in (("weight", "in_proj_weight"), ("bias", "in_proj_bias")):
            cuts = [state[f"{layer}.self_attn.{which}_proj.{end}"] for which in "qkv"]
            tensors[f"{block}.attn.{fused}"] = torch.cat(cuts)
            for theirs, ours in (
                ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
            ):  # fmt: skip
                tensors[f"{block}.{ours}.{end}"] = state[f"{layer}.{theirs}.{end}"]
    return tensors


def save(model: Any, layout: str, folder: Path) -> Path:
    folder.mkdir()
    if layout == "hugging_face":
        model.save_pretrained(folder)
        return folder
    if layout == "open_clip":
        config = model.config
        sizes = {
            "layers": config.num_hidden_layers, "width": config.hidden_size, "patch_size": config.patch_size,
            "image_size": config.image_size, "head_width": config.hidden_size // config.num_attention_heads,
        }  # fmt: skip
        settings = {"model_cfg": {"embed_dim": 16, "vision_cfg": sizes, "text_cfg": {"width": 8}}}
        state = {re.sub("^(?!visual|logit)", "text.", n): t.numpy() for n, t in openai_state_dict(model).items()}
        file = folder / "open_clip_model.safetensors"
        return write_checkpoint(file, state | {"logit_bias": np.zeros(())}, {"open_clip_config.json": settings})
    torch.save(openai_state_dict(model), folder / "clip.pt")
    return folder / "clip.pt"


@pytest.mark.parametrize(
    ("layout", "size", "settings"),
    [
        ("hugging_face", 32, {"hidden_act": "gelu", "num_attention_heads": 4}),  # as LAION's
        ("hugging_face", 48, {}),
        ("hugging_face", 336, {"image_size": 336, "patch_size": 14}),
        ("open_clip", 32, {"hidden_act": "gelu", "num_attention_heads": 4}),  # the library's default without quick_gelu
        ("openai", 336, {"image_size": 336, "patch_size": 14}),
        ("openai", 32, {}),
        ("openai", 48, {}),
    ],
)
def test_clip_equals_the_library_at_every_layer(
    tmp_path: Path, layout: str, size: int, settings: dict[str, Any]
) -> None:
    model = clip_model(**settings)
    is_resized = size != model.config.image_size
    plan = plan_import([save(model, layout, tmp_path / "clip")], image_size=size if is_resized else None)
    assert (plan.model_def.config.image_size, plan.model_def.config.vision_activation) == (
        size, settings.get("hidden_act", "quick_gelu")
    )  # fmt: skip
    run_import(plan, tmp_path / "ours")
    if is_resized:  # the library's, resized by torch
        table = model.embeddings.position_embedding.weight.detach()
        grid = table[1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, (size // 8, size // 8), mode="bilinear", align_corners=False)
        state = model.state_dict()
        state[next(n for n in state if n.endswith("position_embedding.weight"))] = torch.cat(
            [table[:1], grid[0].permute(1, 2, 0).flatten(0, 1)]
        )
        model = clip_model(image_size=size)
        state = {n: t for n, t in state.items() if not n.endswith("position_ids")}
        model.load_state_dict(state, strict=False)
    pixels = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(pixels), output_hidden_states=True)
    ours, _ = load_model(tmp_path / "ours")
    taps = Taps()
    out = jax.jit(lambda x: (ours.vision(x, taps=taps), dict(taps)))(jnp.asarray(pixels.transpose(0, 2, 3, 1)[:, None]))
    assert_close(out[1]["vision/norm_pre"], theirs.hidden_states[0])
    for layer, expected in zip(out[1]["vision/block"], theirs.hidden_states[1:], strict=True):
        assert_close(layer, expected)
    assert_close(out[0][:, 0], theirs.pooler_output)


@pytest.mark.parametrize(("head", "heads"), [(False, 4), (True, 2)])  # as MiniLM's, of 32 columns; as BERT's
def test_bert_equals_the_library_at_every_layer(tmp_path: Path, head: bool, heads: int) -> None:
    model = bert_model(head=head, heads=heads)
    model.save_pretrained(tmp_path / "bert")
    plan = plan_import([tmp_path / "bert"])
    run_import(plan, tmp_path / "ours")
    assert plan.model_def.parts == (("text", "universal", "mlm") if head else ("text", "universal"))
    ids = np.random.default_rng(0).integers(1, 90, (3, 9))
    mask = np.arange(9) < np.array([[9], [6], [2]])
    ids = np.where(mask, ids, 0)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64)), output_hidden_states=True)
    ours, _ = load_model(tmp_path / "ours")
    states = jax.jit(lambda i, m: _text_states(ours, i, m))(jnp.asarray(ids, jnp.int32), jnp.asarray(mask))
    layers = [states["text/embed"], *states["text/layer"], *states["universal/text"]]
    for layer, expected in zip(layers, theirs.hidden_states, strict=True):
        assert_close(np.asarray(layer)[mask], expected.numpy()[mask])
    if head:
        logits = jax.jit(ours.mlm_logits)(states["text/out"])
        assert_close(np.asarray(logits)[mask], theirs.logits.numpy()[mask])


def _text_states(model: Mplug2, ids: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    taps = Taps()
    model.encode_text(ids, mask, taps=taps)
    return dict(taps)


def test_clip_and_bert_initialize_one_model(tmp_path: Path) -> None:
    """As in the release: CLIP's tower; BERT in text, universal layers, fusion and decoder; the rest initialized."""
    clip, bert = clip_model(), bert_model(head=True)
    clip.save_pretrained(tmp_path / "clip")
    bert.save_pretrained(tmp_path / "bert")
    plan = plan_import([tmp_path / "clip", tmp_path / "bert"])
    assert plan.model_def.parts == ("vision", "temporal", "text", "universal", "fusion", "decoder", "mlm")
    report = run_import(plan, tmp_path / "ours")
    _, params = load_model(tmp_path / "ours")
    state = bert.state_dict()

    def theirs(name: str) -> np.ndarray:
        return state[f"bert.{name}"].numpy()

    dense = "output.dense.weight"
    for part, layer, source in (
        ("text", 0, 0), ("text", 1, 1), ("universal", 0, 2), ("universal", 1, 3), ("fusion", 0, 3), ("decoder", 3, 3),
        ("decoder", 0, 0),
    ):  # fmt: skip
        kernel = params[part]["layers"]["mlp"]["down"]["kernel"][layer]
        np.testing.assert_array_equal(kernel, theirs(f"encoder.layer.{source}.{dense}").T)
    for part in ("text", "decoder"):
        np.testing.assert_array_equal(params[part]["embeddings"]["words"], theirs("embeddings.word_embeddings.weight"))
    np.testing.assert_array_equal(params["decoder"]["head"]["bias"], state["cls.predictions.bias"].numpy())
    initialized = {row.name for row in report.rows if row.disposition == "initialized"}
    assert all(any(word in name for word in ("temporal", "cross_", "latents", "visual_norm")) for name in initialized)
    assert any("temporal_1/up" in name for name in initialized)
    assert not np.asarray(params["vision"]["blocks"]["temporal_1"]["up"]["kernel"]).any()  # starts as the identity
    assert np.asarray(params["universal"]["latents"]).std() == pytest.approx(1.0, rel=0.1)


def test_old_names_of_bert_are_accepted(tmp_path: Path) -> None:
    model = bert_model(head=True)
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
           for name, tensor in model.state_dict().items()}  # fmt: skip
    old |= {"bert.pooler.dense.weight": torch.zeros(128, 128), "cls.seq_relationship.bias": torch.zeros(2)}
    torch.save(old, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    report = run_import(plan_import([tmp_path]), tmp_path / "ours")
    model.save_pretrained(tmp_path / "current")
    run_import(plan_import([tmp_path / "current"]), tmp_path / "expected")
    (_, ours), (_, expected) = load_model(tmp_path / "ours"), load_model(tmp_path / "expected")
    assert_equal(ours, expected)
    reasons = {row.name: row.reason for row in report.rows if row.disposition == "ignored"}
    assert reasons["pooler.dense.weight"] == "BERT's pooler, which mPLUG-2 does not have"
    assert "cls.seq_relationship.bias" in reasons


def tensorflow_tensors(state: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return a BERT's tensors as Google's checkpoints have them: its names, kernels as [in, out], optimizer state."""
    tensors = {"global_step": np.array(7)}
    for name, tensor in state.items():
        is_matrix = name.endswith(".weight") and not re.search(r"(LayerNorm|embeddings)\.weight$", name)
        name = re.sub(r"_embeddings\.weight$", "_embeddings", name)
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        name = name.replace("predictions.bias", "predictions.output_bias").replace("layer.", "layer_")
        name = re.sub(r"\.weight$", ".kernel", name).replace(".", "/")
        if name.startswith("cls/predictions/decoder"):
            continue  # tied, so not stored
        tensors[name] = np.ascontiguousarray(tensor.numpy().T) if is_matrix else tensor.numpy()
        tensors[f"{name}/adam_m"] = np.zeros_like(tensors[name])
    assert "bert/encoder/layer_0/attention/self/query/kernel" in tensors
    return tensors


@pytest.mark.parametrize("suffix", ["", ":0"])
def test_tensorflow_s_names_of_bert_fill_the_same_parameters(tmp_path: Path, suffix: str) -> None:
    model = bert_model(head=True)
    model.save_pretrained(tmp_path / "bert")
    tensors = tensorflow_tensors(model.state_dict()) | {
        "cls/seq_relationship/output_weights": np.zeros((2, 128)), "cls/seq_relationship/output_bias": np.zeros(2),
    }  # fmt: skip
    named = {f"{name}{suffix}": np.asarray(value) for name, value in tensors.items()}
    stored = write_checkpoint(tmp_path / "tf" / "model.safetensors", named)
    plan = plan_import([stored])
    assert plan.model_def == plan_import([tmp_path / "bert"]).model_def
    run_import(plan_import([tmp_path / "bert"]), tmp_path / "expected")
    report = run_import(plan, tmp_path / "ours")
    (_, ours), (_, expected) = load_model(tmp_path / "ours"), load_model(tmp_path / "expected")
    assert_equal(ours, expected)
    reasons = {row.reason for row in report.rows if row.disposition == "ignored"}
    assert "state of TensorFlow's optimizer" in reasons
    assert "next-sentence head, which mPLUG-2 does not have" in reasons


def test_a_torchscript_archive_of_clip_is_accepted(tmp_path: Path) -> None:
    """OpenAI published this format, which the release starts from: half precision in a script."""
    names = openai_state_dict(clip_model())

    def build_module(prefix: str) -> Any:
        parent = torch.nn.Module()
        children = {name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)}
        for child in children:
            if f"{prefix}{child}" in names:
                setattr(parent, child, torch.nn.Parameter(names[f"{prefix}{child}"].half()))
            else:
                parent.add_module(child, build_module(f"{prefix}{child}."))
        return parent

    torch.jit.script(build_module("")).save(str(tmp_path / "ViT.pt"))
    assert set(open_source(tmp_path / "ViT.pt").names()) == set(names)
    run_import(plan_import([tmp_path / "ViT.pt"]), tmp_path / "ours")
    _, params = load_model(tmp_path / "ours")
    kernel = names["visual.transformer.resblocks.1.mlp.c_fc.weight"].half().float().numpy().T
    np.testing.assert_array_equal(params["vision"]["blocks"]["mlp"]["up"]["kernel"][1], kernel)


def test_two_clips_are_an_error(tmp_path: Path) -> None:
    clip_model().save_pretrained(tmp_path / "clip")
    with pytest.raises(UserError, match="expected one official checkpoint, or at most one CLIP and one BERT"):
        plan_import([tmp_path / "clip", tmp_path / "clip"])


def test_another_model_of_the_library_is_an_error(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=20, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    with pytest.raises(UserError, match="of an unknown model; expected an official checkpoint, a CLIP or a BERT"):
        plan_import([tmp_path / "gpt"])
