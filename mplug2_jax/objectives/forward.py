"""Forward pass of a batch: intermediates that several objectives share are computed once."""

import functools
import zlib
from collections.abc import Mapping
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from mplug2_jax.model.mplug2 import Mplug2
from mplug2_jax.objectives.cider import DocumentFrequencies
from mplug2_jax.objectives.queue import Queue
from mplug2_jax.parallel.sharding import constrain

DeviceBatch = Mapping[str, Shaped[Array, "..."]]
Metrics = dict[str, Array]


class LossOutput(NamedTuple):
    """Result of an objective; ``queue`` is the contrastive queue after this batch, if there is one."""

    loss: Float[Array, ""]
    metrics: Metrics
    queue: Queue | None = None


def named_key(rng: PRNGKeyArray | None, name: str) -> PRNGKeyArray | None:
    """Derive a key by name, so that adding a use of randomness never changes the others."""
    return None if rng is None else jax.random.fold_in(rng, zlib.crc32(name.encode()))


class ForwardPass:
    """A batch and a model, with the intermediates that objectives share, computed on first access.

    ``rng=None`` means evaluation. If the run has them: ``teacher`` is the teacher's forward pass of the same batch,
    ``alpha`` its weight, ``queue`` the stream's contrastive queue, ``frequencies`` the document frequencies of CIDEr-D.
    Use it within a single trace.
    """

    def __init__(
        self, model: Mplug2, batch: DeviceBatch, rng: PRNGKeyArray | None = None, *,
        teacher: Optional["ForwardPass"] = None, alpha: Float[Array, ""] | float = 0.0, queue: Queue | None = None,
        frequencies: DocumentFrequencies | None = None,
    ) -> None:  # fmt: skip
        self.model, self.batch, self.rng = model, batch, rng
        self.teacher, self.alpha, self.queue = teacher, alpha, queue
        self.frequencies = frequencies

    def key(self, name: str) -> PRNGKeyArray | None:
        """Return the random key of one use, by its name."""
        return named_key(self.rng, name)

    @functools.cached_property
    def visual(self) -> Float[Array, "b s d"]:
        """Return the visual tokens of ``frames``."""
        return self.model.encode_visual(self.batch["frames"], rng=self.key("visual"))

    @functools.cached_property
    def text(self) -> Float[Array, "b l d"]:
        """Return the text tokens of ``text``."""
        return self.model.encode_text(self.batch["text"], self.batch["text_mask"], rng=self.key("text"))

    @functools.cached_property
    def features(self) -> tuple[Float[Array, "b e"], Float[Array, "b e"]]:
        """Return the (visual, text) features for contrast: unit vectors."""
        head = self.model.contrastive
        return head.visual_features(self.visual), head.text_features(self.text)

    @functools.cached_property
    def instruction_memory(self) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        """Return the decoder's memory and mask for ``instruction``: [visual, fused text] or, without frames, text."""
        mask = self.batch["instruction_mask"]
        text = self.model.encode_text(self.batch["instruction"], mask, rng=self.key("instruction"))
        if "frames" not in self.batch:
            return text, mask
        visual, fused = self.model.fusion(text, mask, self.visual, rng=self.key("fusion"))
        visual_mask = jnp.ones(visual.shape[:2], bool)
        memory = constrain(jnp.concatenate([visual, fused], axis=1), "batch", "visual", None)
        return memory, jnp.concatenate([visual_mask, mask], axis=1)

    @functools.cached_property
    def caption_memory(self) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        """Return the decoder's memory and mask for a caption: those of an instruction if any, else visual tokens."""
        if "instruction" in self.batch and "fusion" in self.model.parts:
            return self.instruction_memory
        return self.visual, jnp.ones(self.visual.shape[:2], bool)

    @functools.cached_property
    def class_logits(self) -> Float[Array, "b c"]:
        """Return the class logits of the image or video clip, or without frames of the text in ``instruction``."""
        if "frames" in self.batch:
            return self.model.classifier(self.visual)
        mask = self.batch["instruction_mask"]
        return self.model.classifier(
            self.model.encode_text(self.batch["instruction"], mask, rng=self.key("instruction"))
        )

    @functools.cached_property
    def example_weights(self) -> Float[Array, " b"]:
        """Return 1 for examples and 0 for padding."""
        mask = self.batch.get("example_mask")
        if mask is None:
            # There may be several answers per example, never fewer than one.
            return jnp.ones(min(value.shape[0] for value in self.batch.values()), jnp.float32)
        return mask.astype(jnp.float32)


def label_cross_entropy(
    log_probs: Float[Array, "*n v"], labels: Int[Array, "*n"], smoothing: float = 0.0
) -> Float[Array, "*n"]:
    """Compute for each row (1 - smoothing) * -log p(label) + smoothing * the mean of -log p over all v.

    That is the cross entropy against (1 - smoothing) * one-hot + smoothing / v, as in torch's CrossEntropyLoss.
    """
    losses = -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    if not smoothing:
        return losses
    return (1.0 - smoothing) * losses - smoothing * jnp.mean(log_probs, axis=-1)


def weighted_mean(values: Float[Array, "*n"], weights: Float[Array, "*n"]) -> Float[Array, ""]:
    """Compute sum(values * weights) / sum(weights); 0 if all weights are 0."""
    total = jnp.sum(weights)
    return jnp.sum(values * weights) / jnp.where(total > 0, total, 1.0)
