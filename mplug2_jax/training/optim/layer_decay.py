"""Layer-wise learning-rate decay: the further a layer is from the heads, the smaller its learning rate.

As in fine-tuning BERT and BEiT, a parameter's rate is scaled by decay ** (the layers above it), where the head counts
as one: a head takes the full rate, the layer below it decay, embeddings decay ** (depth + 1).
"""

from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from mplug2_jax.model.config import ModelConfig
from mplug2_jax.model.fusion import joint_attention_layers
from mplug2_jax.model.mplug2 import Params

_STACK_ORDER = ("universal", "fusion", "decoder")  # stacks that read another one, from the bottom up
_HEADS = frozenset({"mlm", "contrastive", "matching", "classifier"})
_INPUTS = frozenset({"patch", "class_token", "positions", "norm_pre", "embeddings", "latents"})
LAYERS = frozenset({"blocks", "layers", "mixing"})


def depth_from_head(path: tuple[str, ...], config: ModelConfig, parts: frozenset[str]) -> NDArray[np.int64]:
    """Return how many layers are above a parameter, [] or, for a stack's parameters, [layers].

    They are counted along the longest path to a head: vision or text, then the universal layers, fusion, the decoder
    and the head, as far as the model has them; so a decoder is above what it reads. The inputs of a stack (patches,
    words, positions, latents) are a layer below its first one; norms and projections at its end belong to its last.
    """
    stack = "vision" if path[0] == "vision_projection" else path[0]
    if stack in _HEADS or path[:2] == ("decoder", "head"):
        return np.asarray(0)
    after = _STACK_ORDER[_STACK_ORDER.index(stack) + 1 :] if stack in _STACK_ORDER else _STACK_ORDER
    num_layers: int = getattr(config, f"{stack}_layers")
    top = 1 + sum(getattr(config, f"{other}_layers") for other in after if other in parts)
    if path[1] in _INPUTS:
        return np.asarray(top + num_layers)
    if path[1] not in LAYERS:
        return np.asarray(top)
    index = np.arange(num_layers)
    if stack == "fusion":
        is_joint = np.isin(index, joint_attention_layers(num_layers, config.fusion_stride))
        index = index[is_joint if path[1] == "mixing" else ~is_joint]
    return top + num_layers - 1 - index


def lr_scales(shapes: Params, config: ModelConfig, decay: float) -> Params:
    """Return each parameter's factor of its group's learning rate: float32 arrays that broadcast over the parameter.

    Args:
        shapes: of the parameters, by the names of a model whose parts they are.
        config: of the model.
        decay: ``config.optimizer.layer_decay``.
    """
    parts = frozenset(shapes)

    def scale(path: tuple[Any, ...], shape: Any) -> NDArray[np.float32]:
        depth = depth_from_head(tuple(key.key for key in path), config, parts)
        return np.asarray(decay**depth, np.float32).reshape(depth.shape + (1,) * (len(shape.shape) - depth.ndim))

    return jax.tree_util.tree_map_with_path(scale, shapes)
