"""CLIP's vision tower, in OpenAI's names (which the official release keeps) and in Hugging Face's."""

from collections.abc import Iterator, Sequence
from typing import Any

from mplug2_jax.conversion.files.sources import TensorSource
from mplug2_jax.conversion.layouts.schemes import Scheme, dead_rules, without_wrapper
from mplug2_jax.conversion.layouts.slots import Path, Slot, linear, norm
from mplug2_jax.model.config import ModelConfig

_BLOCKS: Path = ("vision", "blocks")


def vision_slots(prefix: str, layers: int, *, temporal: bool) -> Iterator[Slot]:
    """OpenAI's names; ``temporal``: with the local temporal units that the official release adds."""
    yield Slot(f"{prefix}.conv1.weight", ("vision", "patch", "kernel"), layout="patch")
    yield Slot(f"{prefix}.class_embedding", ("vision", "class_token"), layout="same")
    yield Slot(f"{prefix}.positional_embedding", ("vision", "positions"), layout="same")
    yield from norm(f"{prefix}.ln_pre", ("vision", "norm_pre"))
    yield from norm(f"{prefix}.ln_post", ("vision", "norm_post"))
    for i in range(layers):
        block = f"{prefix}.transformer.resblocks.{i}"
        for third, which in enumerate(("query", "key", "value")):
            yield Slot(f"{block}.attn.in_proj_weight", (*_BLOCKS, "attention", which, "kernel"), i, "linear", third)
            yield Slot(f"{block}.attn.in_proj_bias", (*_BLOCKS, "attention", which, "bias"), i, "same", third)
        yield from linear(f"{block}.attn.out_proj", (*_BLOCKS, "attention", "out"), i)
        yield from linear(f"{block}.mlp.c_fc", (*_BLOCKS, "mlp", "up"), i)
        yield from linear(f"{block}.mlp.c_proj", (*_BLOCKS, "mlp", "down"), i)
        for n in ("1", "2"):
            yield from norm(f"{block}.ln_{n}", (*_BLOCKS, f"norm_{n}"), i)
            if temporal:
                unit, path = f"{block}.lmhra{n}", (*_BLOCKS, f"temporal_{n}")
                yield from norm(f"{unit}.ln", (*path, "norm"), i)
                yield from linear(f"{unit}.down_proj", (*path, "down"), i, "pointwise")
                yield from linear(f"{unit}.conv", path, i, "depthwise")
                yield from linear(f"{unit}.up_proj", (*path, "up"), i, "pointwise")


def _hugging_face_slots(layers: int) -> Iterator[Slot]:
    yield Slot("embeddings.patch_embedding.weight", ("vision", "patch", "kernel"), layout="patch")
    yield Slot("embeddings.class_embedding", ("vision", "class_token"), layout="same")
    yield Slot("embeddings.position_embedding.weight", ("vision", "positions"), layout="same")
    yield from norm("pre_layrnorm", ("vision", "norm_pre"))  # sic
    yield from norm("post_layernorm", ("vision", "norm_post"))
    for i in range(layers):
        block = f"encoder.layers.{i}"
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
            yield from linear(f"{block}.self_attn.{theirs}_proj", (*_BLOCKS, "attention", ours), i)
        yield from linear(f"{block}.mlp.fc1", (*_BLOCKS, "mlp", "up"), i)
        yield from linear(f"{block}.mlp.fc2", (*_BLOCKS, "mlp", "down"), i)
        for n in ("1", "2"):
            yield from norm(f"{block}.layer_norm{n}", (*_BLOCKS, f"norm_{n}"), i)


def openai_names(names: Sequence[str]) -> dict[str, str]:
    """OpenAI's names, ``{canonical: stored}``: those of a tower alone are as in a whole CLIP."""
    found = without_wrapper(names, ("visual", "transformer"), str)
    return {f"visual.{name}": found[name] for name in found} if "conv1.weight" in found else found


def is_openai(names: Sequence[str]) -> bool:
    """Whether canonical names are OpenAI's."""
    return "visual.conv1.weight" in names and "visual.transformer.resblocks.0.ln_1.weight" in names


def canonical_names(names: Sequence[str]) -> dict[str, str]:
    """Hugging Face's names, ``{canonical: stored}``: a tower's are the same alone and inside a whole CLIP."""
    return without_wrapper(names, ("vision_model",), lambda name: name.removeprefix("vision_model."))


def is_hugging_face(names: Sequence[str]) -> bool:
    """Whether canonical names are Hugging Face's."""
    return "embeddings.patch_embedding.weight" in names and "encoder.layers.0.self_attn.q_proj.weight" in names


def _sizes(source: TensorSource, patch: str, positions: str, block: str) -> dict[str, Any]:
    """The fields of our sizes that a tower tells, by the names of its tensors (``block`` up to the index)."""
    kernel, table = source.info(patch).shape, source.info(positions).shape
    names = source.names()
    depth = next(i for i in range(len(names) + 1) if not any(name.startswith(f"{block}{i}.") for name in names))
    side = round((table[0] - 1) ** 0.5)
    return {
        "vision_width": kernel[0], "vision_layers": depth, "patch_size": kernel[-1], "image_size": side * kernel[-1],
        "temporal_downsampling": len(kernel) == 5 and kernel[2] == 3,
    }  # fmt: skip


def openai_sizes(source: TensorSource, prefix: str = "visual") -> dict[str, Any]:
    """The fields of our sizes that a tower in OpenAI's names tells."""
    return _sizes(
        source, f"{prefix}.conv1.weight", f"{prefix}.positional_embedding", f"{prefix}.transformer.resblocks."
    )


def hugging_face_sizes(source: TensorSource) -> dict[str, Any]:
    """The fields of our sizes that a tower in Hugging Face's names tells."""
    return _sizes(
        source, "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight", "encoder.layers."
    )


def openai_scheme(config: ModelConfig) -> Scheme:
    """The tower of OpenAI's state dict or archive."""
    dead = dead_rules(
        (r"visual\.proj", "CLIP's projection, which mPLUG-2 replaces"),
        (r"(text|transformer|token_embedding|ln_final)\..*", "CLIP's text tower"),
        (r"positional_embedding|text_projection|logit_scale|logit_bias|attn_mask", "CLIP's text tower"),
        (r"input_resolution|context_length|vocab_size", "sizes, told by the shapes"),
    )
    return Scheme(tuple(vision_slots("visual", config.vision_layers, temporal=False)), {}, dead)


def hugging_face_scheme(config: ModelConfig) -> Scheme:
    """The tower of Hugging Face's CLIP."""
    dead = dead_rules(
        (r"(.*\.)?position_ids", "buffer: the positions 0, 1, 2, ..."),
        (r"text_model\..*|text_projection\..*|logit_scale", "CLIP's text tower"),
        (r"visual_projection\..*", "CLIP's projection, which mPLUG-2 replaces"),
    )
    return Scheme(tuple(_hugging_face_slots(config.vision_layers)), {}, dead)
