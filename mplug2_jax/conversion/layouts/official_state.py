"""The whole official state dict: all names, shapes and dtypes in order, ignored and tied tensors included.

The release's code loads a file strictly only if ignored tensors are there too. Without a leftover file they are
initialized as in the release.
"""

import math
import re
import zlib
from collections.abc import Iterator

import numpy as np

from mplug2_jax.conversion.files.sources import HostArray, TensorInfo
from mplug2_jax.conversion.layouts.official import TIED, student_name, teacher_name
from mplug2_jax.model.config import ModelConfig

LEFTOVER_FILE = "official-rest.safetensors"
"""In the folder of an import: the tensors that the model ignores, so that an export restores the whole file."""

StateInfo = dict[str, TensorInfo]
NamedShapes = Iterator[tuple[str, tuple[int, ...]]]

# CLIP's text tower by the width of its vision tower: (width, layers, vocabulary, positions). Other widths were never
# released, and get the smallest tower that the code can build.
_CLIP_TEXT = {768: (512, 12, 49408, 77), 1024: (768, 12, 49408, 77)}
_NO_CLIP_TEXT = (64, 1, 32, 8)


def official_state(config: ModelConfig, fusion_start: int, *, teacher: bool) -> StateInfo:
    """Return every tensor in the release's order; with ``teacher``, the averaged copies after the student's."""
    names = [
        *_projections(config), *_clip(config), *_text_encoder(config), *_fusion_encoder(config, fusion_start),
        *_text_decoder(config),
    ]  # fmt: skip
    if teacher:
        # The release builds its copies in this order.
        for module in ("visual_encoder", "text_encoder", "fusion_encoder", "text_decoder"):
            names += [(teacher_name(name), shape) for name, shape in names if name.split(".")[0] == module]
        names += [(teacher_name(name), shape) for name, shape in _projections(config)]
    return {
        name: TensorInfo(shape, np.dtype(np.int64 if name.endswith(".position_ids") else np.float32))
        for name, shape in names
    }


def _projections(config: ModelConfig) -> NamedShapes:
    yield from _affine("visn_emb_norm", config.width)
    if config.vision_width != config.width:
        yield from _affine("visn_fc", config.width, config.vision_width)
        yield from _affine("visn_layer_norm", config.width)


def _affine(name: str, *shape: int) -> NamedShapes:
    """Yield the weight of a norm (dim), a linear map (out, in) or a convolution (out, in, ...), and its bias."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _clip(config: ModelConfig) -> NamedShapes:
    vision, patch = config.vision_width, config.patch_size
    width, layers, words, positions = _CLIP_TEXT.get(vision, _NO_CLIP_TEXT)
    top = "visual_encoder"
    yield f"{top}.positional_embedding", (positions, width)
    yield f"{top}.text_projection", (width, width)
    yield f"{top}.logit_scale", ()
    yield f"{top}.visual.class_embedding", (vision,)
    yield f"{top}.visual.positional_embedding", (config.num_patches + 1, vision)
    yield f"{top}.visual.proj", (vision, width)
    yield f"{top}.visual.conv1.weight", (vision, 3, 3 if config.temporal_downsampling else 1, patch, patch)
    yield from _affine(f"{top}.visual.ln_pre", vision)
    for i in range(config.vision_layers):
        yield from _clip_block(f"{top}.visual.transformer.resblocks.{i}", vision, temporal=True)
    yield from _affine(f"{top}.visual.ln_post", vision)
    for i in range(layers):
        yield from _clip_block(f"{top}.transformer.resblocks.{i}", width, temporal=False)
    yield f"{top}.token_embedding.weight", (words, width)
    yield from _affine(f"{top}.ln_final", width)


def _clip_block(name: str, width: int, *, temporal: bool) -> NamedShapes:
    if temporal:
        for unit in (f"{name}.lmhra1", f"{name}.lmhra2"):
            yield from _affine(f"{unit}.ln", width)
            yield from _affine(f"{unit}.down_proj", width // 2, width, 1, 1, 1)
            yield from _affine(f"{unit}.conv", width // 2, 1, 3, 1, 1)
            yield from _affine(f"{unit}.up_proj", width, width // 2, 1, 1, 1)
    yield f"{name}.attn.in_proj_weight", (3 * width, width)
    yield f"{name}.attn.in_proj_bias", (3 * width,)
    yield from _affine(f"{name}.attn.out_proj", width, width)
    yield from _affine(f"{name}.ln_1", width)
    yield from _affine(f"{name}.mlp.c_fc", 4 * width, width)
    yield from _affine(f"{name}.mlp.c_proj", width, 4 * width)
    yield from _affine(f"{name}.ln_2", width)


def _embeddings(name: str, config: ModelConfig) -> NamedShapes:
    yield f"{name}.position_ids", (1, config.max_positions)
    yield f"{name}.word_embeddings.weight", (config.vocab_size, config.width)
    yield f"{name}.position_embeddings.weight", (config.max_positions, config.width)
    yield f"{name}.token_type_embeddings.weight", (2, config.width)
    yield from _affine(f"{name}.LayerNorm", config.width)


def _bert_layer(
    name: str, config: ModelConfig, *, cross: bool, latents: bool = False, separate_vision_mlp: bool = False
) -> NamedShapes:
    """Yield a layer; ``separate_vision_mlp``: with the MLP for vision that the release builds but never uses."""
    width, hidden = config.width, config.mlp_width
    if latents:
        yield f"{name}.latents", (config.num_latents, width)
    for attention in ("attention", "crossattention") if cross else ("attention",):
        for which in ("query", "key", "value"):
            yield from _affine(f"{name}.{attention}.self.{which}", width, width)
        yield from _affine(f"{name}.{attention}.output.dense", width, width)
        yield from _affine(f"{name}.{attention}.output.LayerNorm", width)
    for suffix in ("", "_vision") if separate_vision_mlp else ("",):
        yield from _affine(f"{name}.intermediate{suffix}.dense", hidden, width)
        yield from _affine(f"{name}.output{suffix}.dense", width, hidden)
        yield from _affine(f"{name}.output{suffix}.LayerNorm", width)


def _text_encoder(config: ModelConfig) -> NamedShapes:
    yield from _embeddings("text_encoder.embeddings", config)
    for i in range(config.text_layers + config.universal_layers):
        shared = i >= config.text_layers
        yield from _bert_layer(
            f"text_encoder.encoder.layer.{i}", config, cross=shared, latents=i == config.text_layers,
            separate_vision_mlp=shared,
        )  # fmt: skip


def _fusion_encoder(config: ModelConfig, fusion_start: int) -> NamedShapes:
    yield from _embeddings("fusion_encoder.embeddings", config)
    for i in range(fusion_start + config.fusion_layers):
        yield from _bert_layer(f"fusion_encoder.encoder.layer.{i}", config, cross=True)


def _text_decoder(config: ModelConfig) -> NamedShapes:
    yield from _embeddings("text_decoder.bert.embeddings", config)
    first_shared = config.decoder_layers - config.universal_layers
    for i in range(config.decoder_layers):
        name = f"text_decoder.bert.encoder.layer.{i}"
        yield from _bert_layer(
            name, config, cross=True, latents=i == first_shared, separate_vision_mlp=i >= first_shared
        )
    head, width = "text_decoder.cls.predictions", config.width
    yield f"{head}.bias", (config.vocab_size,)
    yield from _affine(f"{head}.transform.dense", width, width)
    yield from _affine(f"{head}.transform.LayerNorm", width)
    yield from _affine(f"{head}.decoder", config.vocab_size, width)


def tied_to(name: str) -> str | None:
    """Return the name of the tensor that this one repeats, or None."""
    student = student_name(name)
    if student not in TIED:
        return None
    return TIED[student] if name == student else teacher_name(TIED[student])


def init_tensor(name: str, info: TensorInfo, seed: int = 0) -> HostArray:
    """Initialize a tensor as the release does; a function of (seed, name), the same for a teacher's copy.

    CLIP's text tower is initialized as in CLIP's code, every other ignored tensor as in BERT's.
    """
    name = student_name(name)
    shape, dtype = info
    if name.endswith(".position_ids"):
        return np.arange(math.prod(shape), dtype=dtype).reshape(shape)
    if name == "visual_encoder.logit_scale":
        return np.asarray(math.log(1 / 0.07), dtype)
    if re.search(r"(LayerNorm|\bln_\w+|\bln|visn_emb_norm|visn_layer_norm)\.weight$", name):
        return np.ones(shape, dtype)
    if name.endswith("bias"):
        return np.zeros(shape, dtype)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return (rng.standard_normal(shape, np.float32) * np.float32(_init_std(name, shape))).astype(dtype)


def _init_std(name: str, shape: tuple[int, ...]) -> float:
    """Return the standard deviation of a weight's initialization."""
    if name.endswith(".latents"):
        return 1.0
    if not name.startswith("visual_encoder.") or name == "visual_encoder.token_embedding.weight":
        return 0.02
    if name == "visual_encoder.positional_embedding":
        return 0.01
    width = shape[-1] if not name.endswith(".c_proj.weight") else shape[0]
    if name.endswith("visual.proj"):
        return shape[0] ** -0.5
    if name.endswith((".out_proj.weight", ".c_proj.weight")):
        return width**-0.5 * (2 * 12) ** -0.5  # CLIP's text towers have 12 layers
    return (2 * width) ** -0.5 if name.endswith(".c_fc.weight") else width**-0.5
