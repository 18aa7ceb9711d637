"""BERT's names in Hugging Face's library and in the official release, and which of our modules BERT initializes."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from mplug2_jax.conversion.files.sources import TensorSource
from mplug2_jax.conversion.layouts.name_mapping import NameMapping, compile_patterns, strip_wrappers
from mplug2_jax.conversion.layouts.tensor_mapping import ParamPath, TensorMapping, map_linear, map_norm
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig

HEAD, TYPES = "cls.predictions", "embeddings.token_type_embeddings.weight"
_NOT_REQUESTED = "initializes no part of this model"
_VARIANTS = (
    r"\w*roberta|camembert|albert|distilbert|electra|deberta\w*|mpnet|ernie\w*|esm|nezha|layoutlm\w*|data2vec\w*|"
    r"longformer|big_?bird|mobilebert|convbert|megatron_?bert|roformer|xlm\w*|luke|splinter|markuplm|lilt|xmod"
)
_LAYER = (
    r"encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|attention\.output\.(dense|LayerNorm)|intermediate\.dense"
    r"|output\.(dense|LayerNorm))\.(weight|bias)"
)

_OLD_NAMES = (
    (r":0$", ""), (r"/", "."), (r"\blayer_(\d+)", r"layer.\1"), (r"_embeddings$", "_embeddings.weight"),
    (r"\.(kernel|output_weights)$", ".weight"), (r"\.output_bias$", ".bias"),
    (r"\bLayerNorm\.gamma$", "LayerNorm.weight"), (r"\bLayerNorm\.beta$", "LayerNorm.bias"),
)  # fmt: skip
"""TensorFlow's names, and those of norms before 2019; patterns and replacements, in this order."""


def _map_attention(name: str, path: ParamPath, norm_path: ParamPath, layer: int) -> Iterator[TensorMapping]:
    for which in ("query", "key", "value"):
        yield from map_linear(f"{name}.self.{which}", (*path, which), layer)
    yield from map_linear(f"{name}.output.dense", (*path, "out"), layer)
    yield from map_norm(f"{name}.output.LayerNorm", norm_path, layer)


def map_layer(name: str, path: ParamPath, layer: int, *, cross: bool) -> Iterator[TensorMapping]:
    """Map one layer; ``cross``: with the cross attention that the official release adds."""
    yield from _map_attention(f"{name}.attention", (*path, "self_attention"), (*path, "self_norm"), layer)
    if cross:
        yield from _map_attention(f"{name}.crossattention", (*path, "cross_attention"), (*path, "cross_norm"), layer)
    yield from map_linear(f"{name}.intermediate.dense", (*path, "mlp", "up"), layer)
    yield from map_linear(f"{name}.output.dense", (*path, "mlp", "down"), layer)
    yield from map_norm(f"{name}.output.LayerNorm", (*path, "mlp_norm"), layer)


def map_layers(name: str, indices: Iterable[int], path: ParamPath, *, cross: bool) -> Iterator[TensorMapping]:
    """Map layers ``name.i`` with these indices to a stack, in order; ``cross`` as in :func:`map_layer`."""
    for layer, i in enumerate(indices):
        yield from map_layer(f"{name}.{i}", path, layer, cross=cross)


def map_embeddings(name: str, path: ParamPath) -> Iterator[TensorMapping]:
    """Map word, position and type tables and their norm."""
    for table, leaf in (("word", "words"), ("position", "positions"), ("token_type", "types")):
        yield TensorMapping(f"{name}.{table}_embeddings.weight", (*path, leaf), transform="identity")
    yield from map_norm(f"{name}.LayerNorm", (*path, "norm"))


def map_head(name: str, path: ParamPath) -> Iterator[TensorMapping]:
    """Map the masked-language-modeling head, without the matrix that is tied to the word table."""
    yield from map_linear(f"{name}.transform.dense", (*path, "dense"))
    yield from map_norm(f"{name}.transform.LayerNorm", (*path, "norm"))
    yield TensorMapping(f"{name}.bias", (*path, "bias"), transform="identity")


def canonical_names(names: Sequence[str]) -> dict[str, str]:
    """Return Hugging Face's names, ``{canonical: stored}``: without ``bert.``, and norms as in current versions.

    Those of TensorFlow (``bert/encoder/layer_0/attention/self/query/kernel``) are accepted too.
    """

    def rename(name: str) -> str:
        for pattern, new in _OLD_NAMES:
            name = re.sub(pattern, new, name)
        return name.removeprefix("bert.")

    return strip_wrappers(names, ("bert",), rename)


def find_transposed(names: Mapping[str, str]) -> set[str]:
    """Return the canonical names of matrices that TensorFlow stores as [in, out]."""
    return {canonical for canonical, stored in names.items() if re.search(r"/kernel(:0)?$", stored)}


def find_variant(names: Sequence[str]) -> str:
    """Return which variant of BERT the names are of, if any; its tensors may have BERT's names."""
    matches = (re.search(rf"(?:^|\.)({_VARIANTS})\.", name, re.IGNORECASE) for name in names)
    return next((match[1] for match in matches if match), "")


def is_bert(names: Sequence[str]) -> bool:
    """Return whether canonical names are a BERT's."""
    return "embeddings.word_embeddings.weight" in names and "encoder.layer.0.attention.self.query.weight" in names


def sizes(source: TensorSource) -> dict[str, int]:
    """Return the ModelConfig fields that a BERT's shapes determine, with its layers divided as in the paper.

    Raises:
        UserError: the type table is not a BERT's.
    """
    types = source.info(TYPES).shape if TYPES in source.names() else (2,)
    if types[0] != 2:
        raise UserError(
            f"{TYPES} has {types[0]} row{'s' * (types[0] != 1)}, BERT's has 2: this is RoBERTa or similar, whose "
            "positions and vocabulary mPLUG-2 does not have; expected a BERT"
        )
    words, width = source.info("embeddings.word_embeddings.weight").shape
    names = set(source.names())
    depth = next(i for i in range(len(names)) if f"encoder.layer.{i}.attention.self.query.weight" not in names)
    return {
        "width": width, "mlp_width": source.info("encoder.layer.0.intermediate.dense.weight").shape[0],
        "text_layers": max(depth - 2, 0), "universal_layers": min(2, depth), "fusion_layers": max(1, depth // 4),
        "decoder_layers": min(12, depth), "vocab_size": words,
        "max_positions": source.info("embeddings.position_embeddings.weight").shape[0],
    }  # fmt: skip


def map_bert_names(config: ModelConfig, parts: Sequence[str], *, head: bool) -> NameMapping:
    """Map BERT to text and universal layers, its last layers to fusion, and its first to the decoder.

    BERT has no cross attention and no latents. ``head``: whether the checkpoint has the MLM head.
    """
    mappings: list[TensorMapping] = []
    if "text" in parts:
        mappings += map_embeddings("embeddings", ("text", "embeddings"))
        mappings += map_layers("encoder.layer", range(config.text_layers), ("text", "layers"), cross=False)
    depth = config.text_layers + config.universal_layers
    if "universal" in parts:
        mappings += map_layers("encoder.layer", range(config.text_layers, depth), ("universal", "layers"), cross=False)
    if "fusion" in parts:
        last = range(depth - config.fusion_layers, depth)
        mappings += map_layers("encoder.layer", last, ("fusion", "layers"), cross=False)
    if "decoder" in parts:
        mappings += map_embeddings("embeddings", ("decoder", "embeddings"))
        mappings += map_layers("encoder.layer", range(config.decoder_layers), ("decoder", "layers"), cross=False)
        mappings += map_head(HEAD, ("decoder", "head")) if head else ()
    if "mlm" in parts and head:
        mappings += map_head(HEAD, ("mlm",))
    tied = {f"{HEAD}.decoder.weight": "embeddings.word_embeddings.weight", f"{HEAD}.decoder.bias": f"{HEAD}.bias"}
    ignored = compile_patterns(
        (r".*\.adam_[mv]|global_step", "state of TensorFlow's optimizer"),
        (r"embeddings\.position_ids", "buffer: the positions 0, 1, 2, ..."),
        (r"pooler\..*", "BERT's pooler, which mPLUG-2 does not have"),
        (r"cls\.seq_relationship\..*", "next-sentence head, which mPLUG-2 does not have"),
        (r"cls\.predictions\..*", "the model has no decoder and no MLM head"),
        (r"embeddings\.((word|position|token_type)_embeddings\.weight|LayerNorm\.(weight|bias))", _NOT_REQUESTED),
        (_LAYER, _NOT_REQUESTED),
        (r"(?!(embeddings|encoder|cls)\.).*", "head of a fine-tuned BERT, which mPLUG-2 does not have"),
    )
    return NameMapping(tuple(mappings), tied, ignored)
