"""Features of pictures, clips and texts by a model: one array for each example of a set, shard by shard."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Shaped
from numpy.typing import NDArray

from data_pipelines.bad_records import BadRecord
from data_pipelines.config import DataConfig, Kind
from data_pipelines.loader import EvaluationSet
from data_pipelines.order import HostShards
from data_pipelines.tokenizers import Tokenizer
from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.model.mplug2 import ModelDef, Mplug2, Params
from mplug2_jax.model.taps import Taps
from mplug2_jax.objectives.forward import DeviceBatch
from mplug2_jax.parallel.placement import (
    check_batch_divisible,
    local_batch_shards,
    num_batch_shards,
    put_batch,
    replicated_sharding,
)
from mplug2_jax.parallel.processes import allgather_objects

Pool = Literal["none", "mean", "cls"]
Named = dict[str, Array]

SHARD_BYTES, SHARD_ROWS = 256 << 20, 16_384
"""A shard holds as many examples as fit into both."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """What is kept of each example, in float32.

    ``contrastive``: the unit vector that contrast compares, of visual token 0 or of [CLS].

    ``pooled``: the mean over the last tokens, which are what fusion and decoder read (taps ``visual/out`` and
    ``text/out``): of pictures and clips the class token and every patch of every frame, of texts [CLS], [SEP] and all
    between them, and no padding.

    The name of a tap: its tokens, all of them (``pool="none"``), their ``mean`` as above, or the first (``cls``). A tap
    that is stacked over layers, or that has a row for each frame, keeps these dimensions before that of tokens.
    """

    name: str = "contrastive"
    pool: Pool = "none"

    def __post_init__(self) -> None:
        """Checks that the pooling has a meaning. Raises UserError."""
        if self.name in ("contrastive", "pooled") and self.pool != "none":
            raise UserError(f"pool '{self.pool}' is for the tokens of a tap, and feature '{self.name}' is one vector")


@dataclasses.dataclass(frozen=True)
class FeatureShard:
    """The features of the examples at the places ``first`` to ``stop`` of a set, those left out that cannot be used.

    ``arrays`` has ``features`` [n, ...] float32, and with all tokens of texts ``lengths`` [n] int32, how many of them
    are no padding.
    """

    first: int
    stop: int
    ids: tuple[str, ...]
    arrays: Mapping[str, NDArray[Any]]
    faults: tuple[BadRecord, ...]


class FeatureExtractor:
    """One kind of feature for all examples of a set, compiled once.

    Args:
        config: which feature.
        data: of which records; their ``visual`` or ``examples.text_length`` say how they are read.
        definition: the model's.
        tokenizer: the run's.
        mesh: to compute on.
        seed: of the run.

    Raises:
        UserError: parts that the model lacks, an unknown tap, or a batch that the mesh cannot split.
        DataError: sources that are missing or hold nothing that can be used.
    """

    def __init__(
        self, config: FeatureConfig, data: DataConfig, definition: ModelDef, tokenizer: Tokenizer, mesh: Mesh, *,
        seed: int,
    ) -> None:  # fmt: skip
        check_batch_divisible("--batch-size", data.batch_size, mesh)
        check_feature_parts(config.name, data.kind, definition)
        self._set = EvaluationSet(data, tokenizer, name="features", seed=seed)
        self._sources, self._mesh = list(data.sources), mesh
        example = self._set.first_example().arrays
        taps = _offered(definition, example)
        if config.name not in ("contrastive", "pooled", *taps):
            raise UserError(
                f"feature '{config.name}' is none that this model has of a {data.kind}: "
                f"{did_you_mean(config.name, ('contrastive', 'pooled', *taps))}"
            )
        if config.name == "pooled":
            config = FeatureConfig(name="text/out" if data.kind == "text" else "visual/out", pool="mean")
        axis = taps.get(config.name, 0)
        compute: Callable[[Params, DeviceBatch], Named] = lambda params, batch: _features(  # noqa: E731
            definition.bind(params), batch, config, axis
        )
        made = jax.eval_shape(compute, definition.shapes, _batch_of(example, 1))
        self.shapes = {name: (tuple(x.shape[1:]), x.dtype.name) for name, x in made.items()}  # of one example
        # Every process gets all features of a batch, whoever's devices made them; the first will write them.
        self._compute = jax.jit(compute, out_shardings=replicated_sharding(mesh))

    def __len__(self) -> int:
        """Number of records, those that cannot be used among them."""
        return len(self._set)

    @property
    def shard_rows(self) -> int:
        """Examples of a shard: whatever the batch size and the mesh, so that a run may go on with others."""
        shape, dtype = self.shapes["features"]
        return max(1, min(SHARD_ROWS, SHARD_BYTES // max(1, np.dtype(dtype).itemsize * int(np.prod(shape)))))

    def shards(
        self, params: Params, start: int = 0, on_batch: Callable[[int], None] = lambda place: None
    ) -> Iterator[FeatureShard]:
        """All shards from place ``start`` on; all processes call it, and get the same.

        Args:
            params: the model's.
            start: where a shard begins.
            on_batch: called with the place that comes next, before every batch.
        """
        rows: list[Mapping[str, NDArray[Any]]] = []
        ids: dict[int, str] = {}
        faults: dict[int, BadRecord] = {}
        first = place = start
        for batch in self._set.batches(HostShards(local_batch_shards(self._mesh), num_batch_shards(self._mesh)), start):
            on_batch(place)
            with jax.set_mesh(self._mesh):
                computed = self._compute(params, put_batch(batch.arrays, self._mesh))
            rows.append({name: np.asarray(value) for name, value in computed.items()})
            ids |= {at: self._id(at, example.key) for at, example in batch.examples.items()}
            faults |= batch.bad_records
            place += len(rows[-1]["features"])
            while first < len(self) and min(place, len(self)) >= (stop := min(first + self.shard_rows, len(self))):
                whole = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
                yield _shard(first, stop, whole, ids, faults)
                rows, first = [{name: value[stop - first :] for name, value in whole.items()}], stop

    def _id(self, place: int, key: str) -> str:
        """A record's key; where there are several sources, below its source's name."""
        source = self._set.source_of(place)
        return key if len(self._sources) == 1 or key == source else f"{source}/{key}"


def check_feature_parts(feature: str, kind: Kind, definition: ModelDef) -> None:
    """Checks that a model has what a feature is made of.

    Raises:
        UserError: names the parts that it lacks.
    """
    needed = {"text": ("text",), "image": ("vision",), "video": ("vision", "temporal")}[kind]
    needed = (*needed, "contrastive") if feature == "contrastive" else needed
    missing = [part for part in needed if part not in definition.parts]
    if missing:
        raise UserError(
            f"feature '{feature}' of a {kind} needs the part {' and '.join(missing)}, which this model lacks (it has "
            f"{', '.join(definition.parts)})"
        )


def _tokens(model: Mplug2, batch: DeviceBatch, taps: Taps) -> Float[Array, "b s d"]:
    """The last tokens of a batch's pictures or texts; what is tapped on the way is in ``taps``."""
    if "frames" in batch:
        return model.encode_visual(batch["frames"], taps=taps)
    return model.encode_text(batch["text"], batch["text_mask"], taps=taps)


def _offered(definition: ModelDef, example: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """The taps that an example passes, each with the dimension that the examples of a batch are in.

    It is the one that grows with the batch; nothing is computed.
    """

    def taps_of(examples: int) -> dict[str, Any]:
        def offer(params: Params, batch: DeviceBatch) -> Named:
            taps = Taps()
            _tokens(definition.bind(params), batch, taps)
            return dict(taps)

        return jax.eval_shape(offer, definition.shapes, _batch_of(example, examples))

    two, three = taps_of(2), taps_of(3)
    return {
        name: next(dim for dim, size in enumerate(two[name].shape) if size != three[name].shape[dim]) for name in two
    }


def _batch_of(example: Mapping[str, NDArray[Any]], examples: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct((examples, *x.shape), x.dtype) for name, x in example.items()}


def _features(model: Mplug2, batch: DeviceBatch, config: FeatureConfig, axis: int) -> Named:
    taps = Taps([config.name])
    tokens = _tokens(model, batch, taps)
    if config.name == "contrastive":
        head = model.contrastive
        return {"features": head.visual_features(tokens) if "frames" in batch else head.text_features(tokens)}
    mask = batch.get("text_mask")
    examples = len(tokens)
    tapped = _examples_first(taps[config.name].astype(jnp.float32), axis, examples)
    if config.pool == "cls":
        return {"features": tapped[..., 0, :]}
    if config.pool == "mean":
        counts = jnp.ones((examples, tapped.shape[-2])) if mask is None else mask.astype(jnp.float32)
        counts = counts.reshape(examples, *[1] * (tapped.ndim - 3), -1, 1)
        return {"features": jnp.sum(tapped * counts, -2) / jnp.sum(counts, -2)}
    lengths = {} if mask is None else {"lengths": jnp.sum(mask, -1, dtype=jnp.int32)}
    return {"features": tapped, **lengths}


def _examples_first(x: Shaped[Array, "..."], axis: int, examples: int) -> Shaped[Array, "b ..."]:
    """The dimension of examples in front; several rows of one example, its frames, become a dimension of their own."""
    x = jnp.moveaxis(x, axis, 0)
    each = x.shape[0] // examples
    return x if each == 1 else x.reshape(examples, each, *x.shape[1:])


def _shard(
    first: int,
    stop: int,
    rows: Mapping[str, NDArray[Any]],
    ids: dict[int, str],
    faults: dict[int, BadRecord],
) -> FeatureShard:
    """What all processes know of the places of a shard; taken out of ``ids`` and ``faults``."""
    mine = {
        "ids": [(place, ids.pop(place)) for place in range(first, stop) if place in ids],
        "faults": [
            (place, dataclasses.asdict(faults.pop(place))) for place in range(first, stop) if place in faults
        ],
    }  # fmt: skip
    all_ids: dict[int, str] = {}
    all_faults: dict[int, BadRecord] = {}
    for theirs in allgather_objects(mine):
        all_ids |= dict(theirs["ids"])
        all_faults |= {place: BadRecord(**fields) for place, fields in theirs["faults"]}
    places = sorted(all_ids)
    taken = np.asarray(places, np.int64) - first
    return FeatureShard(
        first, stop, tuple(all_ids[place] for place in places), {name: value[taken] for name, value in rows.items()},
        tuple(all_faults[place] for place in sorted(all_faults)),
    )  # fmt: skip
