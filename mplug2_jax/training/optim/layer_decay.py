"""Layer-wise decay of learning rates: the further a layer is from the heads, the less of its rate it takes.

As in fine-tuning BERT and BEiT, whatever a parameter is of takes decay ** (the layers above it), the head counting as
one of them: a head takes the whole rate, the layer below it decay, embeddings decay ** (depth + 1).
"""

from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from mplug2_jax.model.config import ModelConfig
from mplug2_jax.model.fusion import joint_attention_layers
from mplug2_jax.model.mplug2 import Params

_JOINT = ("universal", "fusion", "decoder")  # stacks that read another, from the bottom up
_HEADS = frozenset({"mlm", "contrastive", "matching", "classifier"})
_INPUTS = frozenset({"patch", "class_token", "positions", "norm_pre", "embeddings", "latents"})
_LAYERS = frozenset({"blocks", "layers", "mixing"})


def depth_from_head(path: tuple[str, ...], config: ModelConfig, parts: frozenset[str]) -> NDArray[np.int64]:
    """How many layers are above a parameter, [] or, for a stack's parameters, [layers].

    They are counted along the longest way to a head: vision or text, then the universal layers, fusion, the decoder,
    and the head, as far as the model has them. So a decoder stands on top of what it reads. What begins a stack
    (patches, words, positions, latents) is a layer below its first; norms and projections that end one are of its last.
    """
    stack = "vision" if path[0] == "vision_projection" else path[0]
    if stack in _HEADS or path[:2] == ("decoder", "head"):
        return np.asarray(0)
    after = _JOINT[_JOINT.index(stack) + 1 :] if stack in _JOINT else _JOINT
    depth: int = getattr(config, f"{stack}_layers")
    top = 1 + sum(getattr(config, f"{other}_layers") for other in after if other in parts)
    if path[1] in _INPUTS:
        return np.asarray(top + depth)
    if path[1] not in _LAYERS:
        return np.asarray(top)
    index = np.arange(depth)
    if stack == "fusion":
        mixes = np.isin(index, joint_attention_layers(depth, config.fusion_stride))
        index = index[mixes if path[1] == "mixing" else ~mixes]
    return top + depth - 1 - index


def lr_scales(shapes: Params, config: ModelConfig, decay: float) -> Params:
    """What of its group's learning rate each parameter takes: float32 arrays that broadcast over the parameter.

    Args:
        shapes: the parameters', by the names of a model whose parts they are.
        config: the model's.
        decay: config.optimizer.layer_decay.
    """
    parts = frozenset(shapes)

    def factor(path: tuple[Any, ...], shape: Any) -> NDArray[np.float32]:
        above = depth_from_head(tuple(key.key for key in path), config, parts)
        return np.asarray(decay**above, np.float32).reshape(above.shape + (1,) * (len(shape.shape) - above.ndim))

    return jax.tree_util.tree_map_with_path(factor, shapes)
