"""Vision-language contrast over the global batch, in tiles that stay small on any number of chips.

The similarity matrix of 131,072 pairs (4,096 chips x 32) would need 134 MB for the gathered features alone. Here each
tile gathers a few rows from every chip, so that a tile's texts are spread like the batch is; rows are combined by their
log-sum-exp, columns are complete within their tile, and the backward pass recomputes tile by tile. The same code on one
device is one matrix.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mplug2_jax.errors import check_range
from mplug2_jax.objectives.forward import Forward, Outcome, weighted_mean
from mplug2_jax.objectives.momentum import momentum_contrastive_loss
from mplug2_jax.parallel.logical import activation_spec, constrain

_TILE_BYTES = 2**24  # gathered features of one tile, float32
_NOTHING = -1e30  # a score that no softmax sees


@dataclasses.dataclass(frozen=True, kw_only=True)
class VlcConfig:
    """How to contrast.

    ``min_temperature`` keeps the learned temperature from collapsing; the release's v1 code has no such floor (0).
    With ``queue_size`` the candidates are a momentum teacher's features and a queue of past ones, as in v1.
    """

    min_temperature: float = 0.01
    queue_size: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges. Raises UserError."""
        check_range("config.tasks.vlc.min_temperature", self.min_temperature, 0)
        check_range("config.tasks.vlc.queue_size", self.queue_size, 0)


def tiles_for(batch: int, width: int) -> int:
    """How many tiles: the fewest that divide a chip's rows evenly and keep a tile's features within 16 MiB."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else dict(mesh.shape)
    axes = activation_spec(("batch",), sizes, (batch,))[0]
    axes = (axes,) if isinstance(axes, str) else axes or ()  # PartitionSpec turns a tuple of one into its element
    shards = math.prod(sizes[a] for a in axes)
    rows = batch // shards
    divisors = [d for d in range(1, rows + 1) if rows % d == 0]
    return next((d for d in divisors if batch * width * 4 / d <= _TILE_BYTES), rows)


def contrastive_loss(
    visual: Float[Array, "b e"],
    text: Float[Array, "b e"],
    ids: Int[Array, " b"],
    counts: Float[Array, " b"],
    temperature: Float[Array, ""],
    *,
    tiles: int | None = None,
) -> Float[Array, ""]:
    """Mean of both directions of softmax cross entropy; all pairs with equal ids are positives, equally weighted.

    Features are unit vectors; examples with ``counts`` 0 are neither rows nor columns.
    """
    batch, width = visual.shape
    tiles = tiles or tiles_for(batch, width)
    # Gradients take the layout of what they belong to; unpinned, that of the texts may come out whole on every chip.
    visual, text = constrain(visual, "batch", None), constrain(text, "batch", None)

    def cut(x: Array) -> Array:  # every tile takes its rows from every chip
        return jnp.moveaxis(x.reshape(batch // tiles, tiles, *x.shape[1:]), 1, 0)

    def tile(its: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        tile_text, tile_ids, tile_counts = (constrain(x, *([None] * x.ndim)) for x in its)
        scores = constrain(visual @ tile_text.T / temperature, "batch", None)
        positive = ((ids[:, None] == tile_ids) & (counts[:, None] > 0) & (tile_counts > 0)).astype(jnp.float32)
        over_texts = jax.nn.logsumexp(jnp.where(tile_counts > 0, scores, _NOTHING), axis=1)
        over_pictures = jax.nn.logsumexp(jnp.where(counts[:, None] > 0, scores, _NOTHING), axis=0)
        return (
            *(constrain(x, "batch") for x in (over_texts, (scores * positive).sum(1), positive.sum(1))),
            *(constrain(x, None) for x in (over_pictures, (scores * positive).sum(0), positive.sum(0))),
        )

    parts = jax.lax.map(jax.checkpoint(tile, prevent_cse=False), (cut(text), cut(ids), cut(counts)))
    row_total, row_positive, row_count, column_total, column_positive, column_count = parts
    rows = jax.nn.logsumexp(row_total, axis=0) - row_positive.sum(0) / jnp.maximum(row_count.sum(0), 1.0)
    columns = column_total - column_positive / jnp.maximum(column_count, 1.0)
    return (weighted_mean(rows, counts) + weighted_mean(columns, cut(counts))) / 2


def vlc_loss(forward: Forward, config: VlcConfig) -> Outcome:
    """Contrast between ``frames`` and ``text``, both directions."""
    ids = forward.batch["example_id"]
    temperature = jnp.maximum(forward.model.contrastive.temperature[...], config.min_temperature)
    if forward.queue is None or forward.teacher is None:
        loss = contrastive_loss(*forward.features, ids, forward.counts, temperature)
        return Outcome(loss, {"loss": loss, "temperature": temperature})
    theirs = jax.lax.stop_gradient(forward.teacher.features)
    loss = momentum_contrastive_loss(forward.features, theirs, ids, forward.queue, temperature, forward.alpha)
    return Outcome(loss, {"loss": loss, "temperature": temperature}, forward.queue.push(*theirs, ids))
