"""CLIP's vision tower in OpenAI's names (also used by the official release) and in Hugging Face's."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from mplug2_jax.conversion.files.sources import TensorSource
from mplug2_jax.conversion.layouts.name_mapping import NameMapping, compile_patterns, strip_wrappers
from mplug2_jax.conversion.layouts.tensor_mapping import ParamPath, TensorMapping, map_linear, map_norm
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig

_BLOCKS: ParamPath = ("vision", "blocks")


def map_vision(prefix: str, layers: int, *, temporal: bool) -> Iterator[TensorMapping]:
    """Map OpenAI's names; ``temporal``: with the local temporal units that the official release adds."""
    yield TensorMapping(f"{prefix}.conv1.weight", ("vision", "patch", "kernel"), transform="patch")
    yield TensorMapping(f"{prefix}.class_embedding", ("vision", "class_token"), transform="identity")
    yield TensorMapping(f"{prefix}.positional_embedding", ("vision", "positions"), transform="identity")
    yield from map_norm(f"{prefix}.ln_pre", ("vision", "norm_pre"))
    yield from map_norm(f"{prefix}.ln_post", ("vision", "norm_post"))
    for i in range(layers):
        block = f"{prefix}.transformer.resblocks.{i}"
        for qkv_index, which in enumerate(("query", "key", "value")):
            projection = (*_BLOCKS, "attention", which)
            yield TensorMapping(f"{block}.attn.in_proj_weight", (*projection, "kernel"), i, "linear", qkv_index)
            yield TensorMapping(f"{block}.attn.in_proj_bias", (*projection, "bias"), i, "identity", qkv_index)
        yield from map_linear(f"{block}.attn.out_proj", (*_BLOCKS, "attention", "out"), i)
        yield from map_linear(f"{block}.mlp.c_fc", (*_BLOCKS, "mlp", "up"), i)
        yield from map_linear(f"{block}.mlp.c_proj", (*_BLOCKS, "mlp", "down"), i)
        for n in ("1", "2"):
            yield from map_norm(f"{block}.ln_{n}", (*_BLOCKS, f"norm_{n}"), i)
            if temporal:
                unit, path = f"{block}.lmhra{n}", (*_BLOCKS, f"temporal_{n}")
                yield from map_norm(f"{unit}.ln", (*path, "norm"), i)
                yield from map_linear(f"{unit}.down_proj", (*path, "down"), i, "pointwise")
                yield from map_linear(f"{unit}.conv", path, i, "depthwise")
                yield from map_linear(f"{unit}.up_proj", (*path, "up"), i, "pointwise")


def _map_hugging_face(layers: int) -> Iterator[TensorMapping]:
    yield TensorMapping("embeddings.patch_embedding.weight", ("vision", "patch", "kernel"), transform="patch")
    yield TensorMapping("embeddings.class_embedding", ("vision", "class_token"), transform="identity")
    yield TensorMapping("embeddings.position_embedding.weight", ("vision", "positions"), transform="identity")
    yield from map_norm("pre_layrnorm", ("vision", "norm_pre"))  # sic
    yield from map_norm("post_layernorm", ("vision", "norm_post"))
    for i in range(layers):
        block = f"encoder.layers.{i}"
        for projection, leaf in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
            yield from map_linear(f"{block}.self_attn.{projection}_proj", (*_BLOCKS, "attention", leaf), i)
        yield from map_linear(f"{block}.mlp.fc1", (*_BLOCKS, "mlp", "up"), i)
        yield from map_linear(f"{block}.mlp.fc2", (*_BLOCKS, "mlp", "down"), i)
        for n in ("1", "2"):
            yield from map_norm(f"{block}.layer_norm{n}", (*_BLOCKS, f"norm_{n}"), i)


_OTHER_TOWERS = (
    (r"visual\.trunk\.", "a tower of timm: SigLIP's has no class token, and EVA's and ConvNeXt's have other layers"),
    (r"patch_embedding\.bias$", "SigLIP, whose tower has no class token"),
    (r"visual\.blocks\.", "EVA-CLIP, whose layers have rotary positions and other norms"),
    (r"visual\.layer1\.", "a CLIP with a ResNet, which has no patches"),
    (r"visual\.attn_pool\.", "CoCa, whose tower ends in an attentional pooling instead of a norm of every patch"),
)


def find_other_tower(names: Sequence[str]) -> str:
    """Return which vision tower the names are of, and why it does not map to ours; empty if none of those known."""
    found = (reason for pattern, reason in _OTHER_TOWERS if any(re.search(rf"(?:^|\.){pattern}", n) for n in names))
    return next(found, "")


def openai_names(names: Sequence[str]) -> dict[str, str]:
    """Return OpenAI's names, ``{canonical: stored}``: those of a single tower as in a whole CLIP."""
    stored = strip_wrappers(names, ("visual", "transformer"), str)
    return {f"visual.{name}": stored[name] for name in stored} if "conv1.weight" in stored else stored


def is_openai(names: Sequence[str]) -> bool:
    """Return whether canonical names are OpenAI's."""
    return "visual.conv1.weight" in names and "visual.transformer.resblocks.0.ln_1.weight" in names


def canonical_names(names: Sequence[str]) -> dict[str, str]:
    """Return Hugging Face's names, ``{canonical: stored}``: those of a tower in a whole CLIP as of a single one."""
    return strip_wrappers(names, ("vision_model",), lambda name: name.removeprefix("vision_model."))


def is_hugging_face(names: Sequence[str]) -> bool:
    """Return whether canonical names are Hugging Face's."""
    return "embeddings.patch_embedding.weight" in names and "encoder.layers.0.self_attn.q_proj.weight" in names


def _sizes(source: TensorSource, patch: str, positions: str, block: str, mlp: str) -> dict[str, Any]:
    """Return the ModelConfig fields that a tower's shapes determine.

    ``block`` is a name prefix up to the index, ``mlp`` the name in a block of the matrix to the hidden layer.

    Raises:
        UserError: the hidden layers of the MLPs are not four times as wide as the tower.
    """
    kernel, table = source.info(patch).shape, source.info(positions).shape
    names = source.names()
    if f"{block}0.{mlp}" in names and (hidden := source.info(f"{block}0.{mlp}").shape[0]) != 4 * kernel[0]:
        raise UserError(
            f"{block}0.{mlp} has {hidden} rows, expected 4 x {kernel[0]}: mPLUG-2's vision tower has no MLPs of other "
            "widths, as ViT-g and ViT-bigG have; import another CLIP"
        )
    depth = next(i for i in range(len(names) + 1) if not any(name.startswith(f"{block}{i}.") for name in names))
    side = round((table[0] - 1) ** 0.5)
    return {
        "vision_width": kernel[0], "vision_layers": depth, "patch_size": kernel[-1], "image_size": side * kernel[-1],
        "temporal_downsampling": len(kernel) == 5 and kernel[2] == 3,
    }  # fmt: skip


def openai_sizes(source: TensorSource, prefix: str = "visual") -> dict[str, Any]:
    """Return the ModelConfig fields that the shapes of a tower in OpenAI's names determine."""
    return _sizes(
        source, f"{prefix}.conv1.weight", f"{prefix}.positional_embedding", f"{prefix}.transformer.resblocks.",
        "mlp.c_fc.weight",
    )  # fmt: skip


def hugging_face_sizes(source: TensorSource) -> dict[str, Any]:
    """Return the ModelConfig fields that the shapes of a tower in Hugging Face's names determine."""
    return _sizes(
        source, "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight", "encoder.layers.",
        "mlp.fc1.weight",
    )  # fmt: skip


def map_openai_names(config: ModelConfig) -> NameMapping:
    """Map the names of OpenAI's state dict or archive to the tower."""
    ignored = compile_patterns(
        (r"visual\.proj", "CLIP's projection, which mPLUG-2 replaces"),
        (r"(text|transformer|token_embedding|ln_final)\..*", "CLIP's text tower"),
        (r"positional_embedding|text_projection|logit_scale|logit_bias|attn_mask", "CLIP's text tower"),
        (r"input_resolution|context_length|vocab_size", "sizes, known from the shapes"),
    )
    return NameMapping(tuple(map_vision("visual", config.vision_layers, temporal=False)), {}, ignored)


def map_hugging_face_names(config: ModelConfig) -> NameMapping:
    """Map the names of Hugging Face's CLIP to the tower."""
    ignored = compile_patterns(
        (r"(.*\.)?position_ids", "buffer: the positions 0, 1, 2, ..."),
        (r"text_model\..*|text_projection\..*|logit_scale", "CLIP's text tower"),
        (r"visual_projection\..*", "CLIP's projection, which mPLUG-2 replaces"),
    )
    return NameMapping(tuple(_map_hugging_face(config.vision_layers)), {}, ignored)
