"""The inputs and outputs of the exported programs, which are the same in every format.

===============  ====================================================================================================
axis             meaning
===============  ====================================================================================================
batch            examples
question         tokens of a question, padded; up to ``max_positions``
memory           what the decoder attends to: 1 + the patches of all frames, then the question
beams            sequences that share one memory
length           of the cache of past keys and values, in tokens; up to ``max_positions``
===============  ====================================================================================================

Layers are stacked, and heads come before the sequence, as matmuls read them. ``decode_step`` writes at ``position``,
and attends to the cache up to there.
"""

from collections.abc import Mapping
from typing import NamedTuple

from mplug2_jax.model.config import ModelConfig

Shape = tuple[int | str, ...]  # names of the axes that may have any size


class ArraySpec(NamedTuple):
    """Shape and dtype of an input or output."""

    shape: Shape
    dtype: str

    def with_sizes(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape for given sizes of the named axes."""
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.shape)


class Program(NamedTuple):
    """The inputs and outputs of a program, in order."""

    inputs: Mapping[str, ArraySpec]
    outputs: Mapping[str, ArraySpec]


def define_programs(config: ModelConfig, *, frames: int, question: bool, dtype: str) -> dict[str, Program]:
    """Return ``encode`` and ``decode_step``.

    Args:
        config: the model's sizes.
        frames: of a video clip; 1: images.
        question: whether the model reads a question.
        dtype: of the floating-point inputs and outputs, but for the logits, which are float32.
    """
    heads, head_width = config.heads, config.width // config.heads
    side = config.image_size
    mask = ArraySpec(("batch", "memory"), "bool")
    memory = ArraySpec((config.decoder_layers, "batch", heads, "memory", head_width), dtype)
    cache = ArraySpec((config.decoder_layers, "batch", "beams", heads, "length", head_width), dtype)
    inputs = {"frames": ArraySpec(("batch", frames, side, side, 3), "uint8")}
    if question:
        inputs["question"] = ArraySpec(("batch", "question"), "int32")
        inputs["question_mask"] = ArraySpec(("batch", "question"), "bool")
    encoded = {"memory_keys": memory, "memory_values": memory, "memory_mask": mask}
    return {
        "encode": Program(inputs, {"memory": ArraySpec(("batch", "memory", config.width), dtype)} | encoded),
        "decode_step": Program(
            {
                "tokens": ArraySpec(("batch", "beams"), "int32"), "position": ArraySpec((), "int32"),
                "past_keys": cache, "past_values": cache, **encoded,
            },
            {"logits": ArraySpec(("batch", "beams", config.vocab_size), "float32"), "keys": cache, "values": cache},
        ),
    }  # fmt: skip
