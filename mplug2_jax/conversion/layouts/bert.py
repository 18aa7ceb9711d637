"""BERT's names, as Hugging Face and the official release write them, and which of our modules start from BERT."""

import re
from collections.abc import Iterator, Sequence

from mplug2_jax.conversion.files.sources import TensorSource
from mplug2_jax.conversion.layouts.schemes import Scheme, dead_rules, without_wrapper
from mplug2_jax.conversion.layouts.slots import Path, Slot, linear, norm
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig

HEAD, TYPES = "cls.predictions", "embeddings.token_type_embeddings.weight"
NOT_ASKED = "no part of this model starts from it"
_RELATIVES = (
    r"\w*roberta|camembert|albert|distilbert|electra|deberta\w*|mpnet|ernie\w*|esm|nezha|layoutlm\w*|data2vec\w*|"
    r"longformer|big_?bird|mobilebert|convbert|megatron_?bert|roformer|xlm\w*|luke|splinter|markuplm|lilt|xmod"
)
_LAYER = (
    r"encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|attention\.output\.(dense|LayerNorm)|intermediate\.dense"
    r"|output\.(dense|LayerNorm))\.(weight|bias)"
)


def _attention(name: str, path: Path, its_norm: Path, layer: int) -> Iterator[Slot]:
    for which in ("query", "key", "value"):
        yield from linear(f"{name}.self.{which}", (*path, which), layer)
    yield from linear(f"{name}.output.dense", (*path, "out"), layer)
    yield from norm(f"{name}.output.LayerNorm", its_norm, layer)


def layer_slots(name: str, path: Path, layer: int, *, cross: bool) -> Iterator[Slot]:
    """One layer; ``cross``: with the cross attention that the official release adds."""
    yield from _attention(f"{name}.attention", (*path, "self_attention"), (*path, "self_norm"), layer)
    if cross:
        yield from _attention(f"{name}.crossattention", (*path, "cross_attention"), (*path, "cross_norm"), layer)
    yield from linear(f"{name}.intermediate.dense", (*path, "mlp", "up"), layer)
    yield from linear(f"{name}.output.dense", (*path, "mlp", "down"), layer)
    yield from norm(f"{name}.output.LayerNorm", (*path, "mlp_norm"), layer)


def embedding_slots(name: str, path: Path) -> Iterator[Slot]:
    """Word, position and type tables and their norm."""
    for theirs, ours in (("word", "words"), ("position", "positions"), ("token_type", "types")):
        yield Slot(f"{name}.{theirs}_embeddings.weight", (*path, ours), layout="same")
    yield from norm(f"{name}.LayerNorm", (*path, "norm"))


def head_slots(name: str, path: Path) -> Iterator[Slot]:
    """The masked-language head, without the matrix that is tied to the word table."""
    yield from linear(f"{name}.transform.dense", (*path, "dense"))
    yield from norm(f"{name}.transform.LayerNorm", (*path, "norm"))
    yield Slot(f"{name}.bias", (*path, "bias"), layout="same")


def canonical_names(names: Sequence[str]) -> dict[str, str]:
    """Hugging Face's variants under one name (``{canonical: stored}``): no ``bert.`` in front, norms as today."""

    def today(name: str) -> str:
        plain = re.sub(r"\bLayerNorm\.gamma$", "LayerNorm.weight", name.removeprefix("bert."))
        return re.sub(r"\bLayerNorm\.beta$", "LayerNorm.bias", plain)

    return without_wrapper(names, ("bert",), today)


def relative_of(names: Sequence[str]) -> str:
    """Which relative of BERT's the names are of, whose tensors may be called as BERT's; nothing if of none."""
    found = (re.search(rf"(?:^|\.)({_RELATIVES})\.", name, re.IGNORECASE) for name in names)
    return next((match[1] for match in found if match), "")


def is_bert(names: Sequence[str]) -> bool:
    """Whether canonical names are a BERT's."""
    return "embeddings.word_embeddings.weight" in names and "encoder.layer.0.attention.self.query.weight" in names


def sizes(source: TensorSource) -> dict[str, int]:
    """The fields of our sizes that a BERT of canonical names tells, and how the paper cuts it up.

    Raises:
        UserError: a type table that is no BERT's.
    """
    types = source.info(TYPES).shape if TYPES in source.names() else (2,)
    if types[0] != 2:
        raise UserError(
            f"{TYPES} has {types[0]} row{'s' * (types[0] != 1)}, BERT's has 2: these are of RoBERTa or the like, whose "
            "positions and words mPLUG-2 has not; expected a BERT"
        )
    words, width = source.info("embeddings.word_embeddings.weight").shape
    names = set(source.names())
    depth = next(i for i in range(len(names)) if f"encoder.layer.{i}.attention.self.query.weight" not in names)
    return {
        "width": width,
        "mlp_width": source.info("encoder.layer.0.intermediate.dense.weight").shape[0],
        "text_layers": max(depth - 2, 0),
        "universal_layers": min(2, depth),
        "fusion_layers": max(1, depth // 4),
        "decoder_layers": min(12, depth),
        "vocab_size": words,
        "max_positions": source.info("embeddings.position_embeddings.weight").shape[0],
    }


def bert_scheme(config: ModelConfig, parts: Sequence[str], *, head: bool) -> Scheme:
    """What starts from BERT: text and universal layers, fusion from its last layers, the decoder from its first.

    Cross attentions and latents are not BERT's and stay fresh. ``head``: whether the checkpoint has the MLM head.
    """
    found: list[Slot] = []
    if "text" in parts:
        found += embedding_slots("embeddings", ("text", "embeddings"))
        for i in range(config.text_layers):
            found += layer_slots(f"encoder.layer.{i}", ("text", "layers"), i, cross=False)
    if "universal" in parts:
        for i in range(config.universal_layers):
            found += layer_slots(f"encoder.layer.{config.text_layers + i}", ("universal", "layers"), i, cross=False)
    if "fusion" in parts:
        first = config.text_layers + config.universal_layers - config.fusion_layers
        for j in range(config.fusion_layers):
            found += layer_slots(f"encoder.layer.{first + j}", ("fusion", "layers"), j, cross=False)
    if "decoder" in parts:
        found += embedding_slots("embeddings", ("decoder", "embeddings"))
        for i in range(config.decoder_layers):
            found += layer_slots(f"encoder.layer.{i}", ("decoder", "layers"), i, cross=False)
        found += head_slots(HEAD, ("decoder", "head")) if head else ()
    if "mlm" in parts and head:
        found += head_slots(HEAD, ("mlm",))
    tied = {
        f"{HEAD}.decoder.weight": "embeddings.word_embeddings.weight",
        f"{HEAD}.decoder.bias": f"{HEAD}.bias",
    }
    dead = dead_rules(
        (r"embeddings\.position_ids", "buffer: the positions 0, 1, 2, ..."),
        (r"pooler\..*", "BERT's pooler, which mPLUG-2 has not"),
        (r"cls\.seq_relationship\..*", "next-sentence head, which mPLUG-2 has not"),
        (r"cls\.predictions\..*", "no decoder and no MLM head among the parts"),
        (r"embeddings\.((word|position|token_type)_embeddings\.weight|LayerNorm\.(weight|bias))", NOT_ASKED),
        (_LAYER, NOT_ASKED),
        (r"(?!(embeddings|encoder|cls)\.).*", "head of a fine-tuned BERT, which mPLUG-2 has not"),
    )
    return Scheme(tuple(found), tied, dead)
