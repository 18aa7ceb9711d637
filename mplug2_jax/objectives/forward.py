"""One batch on its way through one model: what several objectives need is computed once."""

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
    """What an objective gives back; ``queue`` is the contrastive queue with this batch in it, where there is one."""

    loss: Float[Array, ""]
    metrics: Metrics
    queue: Queue | None = None


def named_key(rng: PRNGKeyArray | None, purpose: str) -> PRNGKeyArray | None:
    """A key of its own for every purpose, so that one more random draw never changes another."""
    return None if rng is None else jax.random.fold_in(rng, zlib.crc32(purpose.encode()))


class ForwardPass:
    """A batch and a model, with the intermediate results that objectives share, computed when first asked for.

    ``rng=None`` is evaluation. ``teacher`` is the same batch on its way through the teacher, ``alpha`` how much it
    counts, ``queue`` the stream's contrastive queue, ``frequencies`` what weighs n-grams of captions; each where the
    run has one. Use within a single trace.
    """

    def __init__(
        self,
        model: Mplug2,
        batch: DeviceBatch,
        rng: PRNGKeyArray | None = None,
        *,
        teacher: Optional["Forward"] = None,
        alpha: Float[Array, ""] | float = 0.0,
        queue: Queue | None = None,
        frequencies: DocumentFrequencies | None = None,
    ) -> None:
        self.model, self.batch, self.rng = model, batch, rng
        self.teacher, self.alpha, self.queue = teacher, alpha, queue
        self.frequencies = frequencies

    def key(self, purpose: str) -> PRNGKeyArray | None:
        """Randomness of one purpose."""
        return named_key(self.rng, purpose)

    @functools.cached_property
    def visual(self) -> Float[Array, "b s d"]:
        """Visual tokens of ``frames``."""
        return self.model.encode_visual(self.batch["frames"], rng=self.key("visual"))

    @functools.cached_property
    def text(self) -> Float[Array, "b l d"]:
        """Text tokens of ``text``."""
        return self.model.encode_text(self.batch["text"], self.batch["text_mask"], rng=self.key("text"))

    @functools.cached_property
    def features(self) -> tuple[Float[Array, "b e"], Float[Array, "b e"]]:
        """Unit vectors of pictures and of texts, for contrast."""
        head = self.model.contrastive
        return head.visual_features(self.visual), head.text_features(self.text)

    @functools.cached_property
    def instruction_memory(self) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        """What the decoder reads to answer ``instruction``: [picture, fused text], or text alone without frames."""
        mask = self.batch["instruction_mask"]
        text = self.model.encode_text(self.batch["instruction"], mask, rng=self.key("instruction"))
        if "frames" not in self.batch:
            return text, mask
        visual, fused = self.model.fusion(text, mask, self.visual, rng=self.key("fusion"))
        seen = jnp.ones(visual.shape[:2], bool)
        both = constrain(jnp.concatenate([visual, fused], axis=1), "batch", "visual", None)
        return both, jnp.concatenate([seen, mask], axis=1)

    @functools.cached_property
    def caption_memory(self) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        """What the decoder reads to caption: as instructed where there is an instruction, else the picture alone."""
        if "instruction" in self.batch and "fusion" in self.model.parts:
            return self.instruction_memory
        return self.visual, jnp.ones(self.visual.shape[:2], bool)

    @functools.cached_property
    def class_logits(self) -> Float[Array, "b c"]:
        """Logits of each class: of the picture or clip where there is one, else of the text in ``instruction``."""
        if "frames" in self.batch:
            return self.model.classifier(self.visual)
        mask = self.batch["instruction_mask"]
        return self.model.classifier(
            self.model.encode_text(self.batch["instruction"], mask, rng=self.key("instruction"))
        )

    @functools.cached_property
    def example_weights(self) -> Float[Array, " b"]:
        """1 for examples that count, 0 for padding."""
        mask = self.batch.get("example_mask")
        if mask is None:
            # Answers may be more rows than there are examples, never fewer.
            return jnp.ones(min(value.shape[0] for value in self.batch.values()), jnp.float32)
        return mask.astype(jnp.float32)


def label_cross_entropy(
    log_probs: Float[Array, "*n v"], labels: Int[Array, "*n"], smoothing: float = 0.0
) -> Float[Array, "*n"]:
    """Of each row: (1 - smoothing) * -log p(label) + smoothing * the mean of -log p over all v.

    That is the cross entropy against (1 - smoothing) * one-hot + smoothing / v, as in torch's CrossEntropyLoss.
    """
    losses = -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    if not smoothing:
        return losses
    return (1.0 - smoothing) * losses - smoothing * jnp.mean(log_probs, axis=-1)


def weighted_mean(values: Float[Array, "*n"], weights: Float[Array, "*n"]) -> Float[Array, ""]:
    """sum(values * weights) / sum(weights), and 0 where nothing counts."""
    total = jnp.sum(weights)
    return jnp.sum(values * weights) / jnp.where(total > 0, total, 1.0)
