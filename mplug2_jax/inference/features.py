"""Features of images, videos and texts: one array per example of a set, shard by shard."""

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
from mplug2_jax.model.config import check_has_parts
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
from mplug2_jax.parallel.processes import allgather_dict

Pool = Literal["none", "mean", "cls"]
NamedArrays = dict[str, Array]

SHARD_BYTES, SHARD_ROWS = 256 << 20, 16_384
"""Limits of a shard; the smaller number of examples applies."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """The feature of each example, in float32.

    ``contrastive``: the unit vector that the contrastive head compares, from visual token 0 or [CLS].

    ``pooled``: the mean of the last tokens, which fusion and decoder read (taps ``visual/out`` and ``text/out``): of
    images and videos the class token and all patches of all frames, of texts [CLS], [SEP] and all tokens between them,
    without padding.

    The name of a tap: its tokens, all of them (``pool="none"``), their ``mean`` as above, or the first (``cls``). A tap
    that is stacked over layers, or has a row per frame, keeps these dimensions before that of the tokens.
    """

    name: str = "contrastive"
    pool: Pool = "none"

    def __post_init__(self) -> None:
        """Check that the feature can be pooled. Raises UserError."""
        if self.name in ("contrastive", "pooled") and self.pool != "none":
            raise UserError(f"--pool {self.pool} is for the tokens of a tap, but feature '{self.name}' is one vector")


@dataclasses.dataclass(frozen=True)
class FeatureShard:
    """The features of the records with indices ``first`` to ``stop`` of a set, without those that cannot be used."""

    first: int
    stop: int
    ids: tuple[str, ...]
    arrays: Mapping[str, NDArray[Any]]  # features [n, ...] float32; of all tokens of texts also lengths [n] int32
    bad_records: tuple[BadRecord, ...]


class FeatureExtractor:
    """An extractor of one feature of all records of a set, compiled once.

    Args:
        config: of the feature.
        data: the records, and how they are read: ``visual`` or ``examples.text_length``.
        model_def: of the model.
        tokenizer: of the run.
        mesh: to compute on.
        seed: of the run.

    Raises:
        UserError: the model lacks parts, the tap is unknown, or the mesh does not divide the batch size.
        DataError: a source is missing or has no record that can be used.
    """

    def __init__(
        self, config: FeatureConfig, data: DataConfig, model_def: ModelDef, tokenizer: Tokenizer, mesh: Mesh, *,
        seed: int,
    ) -> None:  # fmt: skip
        check_batch_divisible("--batch-size", data.batch_size, mesh)
        check_feature_parts(config.name, data.kind, model_def)
        self._dataset = EvaluationSet(data, tokenizer, name="features", seed=seed)
        self._sources, self._mesh = list(data.sources), mesh
        example = self._dataset.first_example().arrays
        example_axes = _find_example_axes(model_def, example)
        if config.name not in ("contrastive", "pooled", *example_axes):
            raise UserError(
                f"feature '{config.name}' does not exist for {data.kind}s: "
                f"{did_you_mean(config.name, ('contrastive', 'pooled', *example_axes))}"
            )
        if config.name == "pooled":
            config = FeatureConfig(name="text/out" if data.kind == "text" else "visual/out", pool="mean")
        axis = example_axes.get(config.name, 0)
        compute: Callable[[Params, DeviceBatch], NamedArrays] = lambda params, batch: _compute_features(  # noqa: E731
            model_def.bind(params), batch, config, axis
        )
        outputs = jax.eval_shape(compute, model_def.shapes, _abstract_batch(example, 1))
        self.shapes = {name: (tuple(x.shape[1:]), x.dtype.name) for name, x in outputs.items()}  # of one example
        # Replicated, so that the primary process can write all features of a batch.
        self._compute = jax.jit(model_def.with_precision(compute), out_shardings=replicated_sharding(mesh))

    def __len__(self) -> int:
        """Return the number of records, including those that cannot be used."""
        return len(self._dataset)

    @property
    def shard_rows(self) -> int:
        """Return the records per shard: independent of batch size and mesh, so that both may change on resume."""
        shape, dtype = self.shapes["features"]
        return max(1, min(SHARD_ROWS, SHARD_BYTES // max(1, np.dtype(dtype).itemsize * int(np.prod(shape)))))

    def shards(
        self, params: Params, start: int = 0, on_batch: Callable[[int], None] = lambda index: None
    ) -> Iterator[FeatureShard]:
        """Yield all shards from index ``start`` on; all processes call it, and get the same.

        Args:
            params: of the model.
            start: index of the first record of a shard.
            on_batch: called before every batch, with the index of its first record.
        """
        batches: list[Mapping[str, NDArray[Any]]] = []
        ids: dict[int, str] = {}
        bad_records: dict[int, BadRecord] = {}
        first = index = start
        for batch in self._dataset.batches(
            HostShards(local_batch_shards(self._mesh), num_batch_shards(self._mesh)), start
        ):
            on_batch(index)
            with jax.set_mesh(self._mesh):
                computed = self._compute(params, put_batch(batch.arrays, self._mesh))
            batches.append({name: np.asarray(value) for name, value in computed.items()})
            ids |= {i: self._id(i, example.key) for i, example in batch.examples.items()}
            bad_records |= batch.bad_records
            index += len(batches[-1]["features"])
            while first < len(self) and min(index, len(self)) >= (stop := min(first + self.shard_rows, len(self))):
                rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
                yield _make_shard(first, stop, rows, ids, bad_records)
                batches, first = [{name: value[stop - first :] for name, value in rows.items()}], stop

    def _id(self, index: int, key: str) -> str:
        """Return a record's key, prefixed by its source's name if there are several sources."""
        source = self._dataset.source_of(index)
        return key if len(self._sources) == 1 or key == source else f"{source}/{key}"


def check_feature_parts(feature: str, kind: Kind, model_def: ModelDef) -> None:
    """Check that a model has the parts that compute a feature.

    Raises:
        UserError: names the missing parts.
    """
    needed = {"text": ("text",), "image": ("vision",), "video": ("vision", "temporal")}[kind]
    needed = (*needed, "contrastive") if feature == "contrastive" else needed
    check_has_parts(f"feature '{feature}' of {kind}s", needed, model_def.parts)


def _encode(model: Mplug2, batch: DeviceBatch, taps: Taps) -> Float[Array, "b s d"]:
    """Return the last tokens of a batch's frames or texts, and record intermediates in ``taps``."""
    if "frames" in batch:
        return model.encode_visual(batch["frames"], taps=taps)
    return model.encode_text(batch["text"], batch["text_mask"], taps=taps)


def _find_example_axes(model_def: ModelDef, example: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Return the taps that an example passes, each with its dimension of examples: the one that grows with the batch.

    Nothing is computed.
    """

    def tap_shapes(num_examples: int) -> dict[str, Any]:
        def record(params: Params, batch: DeviceBatch) -> NamedArrays:
            taps = Taps()
            _encode(model_def.bind(params), batch, taps)
            return dict(taps)

        return jax.eval_shape(record, model_def.shapes, _abstract_batch(example, num_examples))

    two, three = tap_shapes(2), tap_shapes(3)
    return {
        name: next(dim for dim, size in enumerate(two[name].shape) if size != three[name].shape[dim]) for name in two
    }


def _abstract_batch(example: Mapping[str, NDArray[Any]], num_examples: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct((num_examples, *x.shape), x.dtype) for name, x in example.items()}


def _compute_features(model: Mplug2, batch: DeviceBatch, config: FeatureConfig, axis: int) -> NamedArrays:
    taps = Taps([config.name])
    tokens = _encode(model, batch, taps)
    if config.name == "contrastive":
        head = model.contrastive
        return {"features": head.visual_features(tokens) if "frames" in batch else head.text_features(tokens)}
    mask = batch.get("text_mask")
    num_examples = len(tokens)
    tapped = _examples_first(taps[config.name].astype(jnp.float32), axis, num_examples)
    if config.pool == "cls":
        return {"features": tapped[..., 0, :]}
    if config.pool == "mean":
        weights = jnp.ones((num_examples, tapped.shape[-2])) if mask is None else mask.astype(jnp.float32)
        weights = weights.reshape(num_examples, *[1] * (tapped.ndim - 3), -1, 1)
        return {"features": jnp.sum(tapped * weights, -2) / jnp.sum(weights, -2)}
    lengths = {} if mask is None else {"lengths": jnp.sum(mask, -1, dtype=jnp.int32)}
    return {"features": tapped, **lengths}


def _examples_first(x: Shaped[Array, "..."], axis: int, num_examples: int) -> Shaped[Array, "b ..."]:
    """Move the dimension of examples to the front; several rows per example, its frames, get a dimension."""
    x = jnp.moveaxis(x, axis, 0)
    rows_per_example = x.shape[0] // num_examples
    return x if rows_per_example == 1 else x.reshape(num_examples, rows_per_example, *x.shape[1:])


def _make_shard(
    first: int, stop: int, rows: Mapping[str, NDArray[Any]], ids: dict[int, str], bad_records: dict[int, BadRecord]
) -> FeatureShard:
    """Gather the records of a shard from all processes; remove them from ``ids`` and ``bad_records``."""
    indices = range(first, stop)
    all_ids = allgather_dict({i: ids.pop(i) for i in indices if i in ids})
    bad = allgather_dict({i: dataclasses.asdict(bad_records.pop(i)) for i in indices if i in bad_records})
    selected = np.asarray(list(all_ids), np.int64) - first
    arrays = {name: value[selected] for name, value in rows.items()}
    return FeatureShard(first, stop, tuple(all_ids.values()), arrays, tuple(BadRecord(**each) for each in bad.values()))
