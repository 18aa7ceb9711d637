"""Shardings of parameters by the table, with skipped rules; batches over the mesh; folded ids."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from mplug2_jax.errors import UserError
from mplug2_jax.model.config import model_config
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.parallel.config import MESH_AXES, MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.parallel.placement import (
    check_batch_divisible,
    local_batch_shards,
    make_param_shardings,
    param_spec,
    put_batch,
)
from mplug2_jax.parallel.sharding import PARAMETER_RULES, activation_spec

SIZES = {"replica": 1, "data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}


def test_params_follow_the_table_and_skipped_rules_have_reasons() -> None:
    assert param_spec((64, 128), ("embed", "mlp"), SIZES) == (PartitionSpec("fsdp", "tensor"), [])
    spec, skipped = param_spec((63, 128), ("embed", "mlp"), SIZES)
    assert spec == PartitionSpec(None, "tensor")
    assert skipped == ["'embed' is not sharded: 63 is not a multiple of fsdp=2"]
    spec, skipped = param_spec((64, 64), ("embed", "embed"), SIZES)
    assert spec == PartitionSpec("fsdp", None)
    assert "already shards" in skipped[0]


def test_a_large_model_is_sharded() -> None:
    """Each device has its share of the kernels; replicated parameters are small."""
    model_def = define_model(model_config("large"), ("vision", "temporal", "text", "universal", "fusion", "decoder"))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    sharded = make_param_shardings(model_def.shapes, model_def.logical_axes, mesh)
    shapes, shardings = jax.tree.leaves(model_def.shapes), jax.tree.leaves(sharded.shardings)
    per_device = sum(int(np.prod(s.shard_shape(x.shape))) for x, s in zip(shapes, shardings, strict=True))
    assert per_device < 1.05 * model_def.num_params() / 8
    assert all("is not sharded" in skipped for skipped in sharded.skipped_rules.values())


def test_every_logical_axis_of_the_model_has_a_rule() -> None:
    parts = ("vision", "temporal", "text", "universal", "fusion", "decoder", "mlm", "contrastive", "matching")
    model_def = define_model(model_config("tiny", num_classes=10), (*parts, "classifier"))
    leaves = jax.tree.leaves(model_def.logical_axes, is_leaf=lambda x: isinstance(x, tuple))
    names = {name for axes in leaves for name in axes if name is not None}
    assert names <= set(PARAMETER_RULES)


def test_dimensions_that_do_not_divide_are_not_sharded() -> None:
    assert activation_spec(("batch", None), SIZES, (8, 3)) == PartitionSpec(("data", "fsdp"), None)
    assert activation_spec(("batch", None), SIZES, (6, 3)) == PartitionSpec("data", None)  # and not over fsdp
    assert activation_spec(("batch", None), SIZES, (5, 3)) == PartitionSpec(None, None)
    assert activation_spec(("batch", "heads"), {"data": 1, "fsdp": 1, "tensor": 1}, (8, 4)) == PartitionSpec(None, None)


def test_frames_shard_over_batch_and_sequence_and_the_visual_sequence_may_be_odd() -> None:
    sizes = {"data": 2, "sequence": 4}
    assert activation_spec(("images",), sizes, (8,)) == PartitionSpec(("data", "sequence"))
    assert activation_spec(("images",), sizes, (6,)) == PartitionSpec("data")
    assert activation_spec(("batch", "visual"), sizes, (2, 4097)) == PartitionSpec("data", "sequence")


def test_batches_are_sharded_and_their_ids_folded() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    ids = np.array([2**62 + i for i in range(8)], np.int64)
    placed = put_batch({"text": np.arange(16).reshape(8, 2), "example_id": ids}, mesh)
    assert placed["text"].sharding.shard_shape((8, 2)) == (1, 2)
    assert placed["example_id"].dtype == np.int32
    assert len(set(np.asarray(placed["example_id"]).tolist())) == 8
    assert (np.asarray(placed["example_id"]) >= 0).all()


def test_rows_are_placed_on_the_devices_of_their_shard() -> None:
    rows = np.arange(16).reshape(8, 2)
    reversed_mesh = Mesh(np.array(jax.devices()[::-1]).reshape(1, 2, 2, 1, 2), MESH_AXES)
    for mesh in (
        make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)),
        make_mesh(MeshConfig(tensor=8, fsdp=1)),
        reversed_mesh,
    ):
        assert local_batch_shards(mesh) == tuple(range(mesh.shape["data"] * mesh.shape["fsdp"]))
        placed = put_batch({"text": rows}, mesh)["text"]
        for shard in placed.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), rows[shard.index])


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_sizes() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    check_batch_divisible("config.x", 16, mesh)
    with pytest.raises(UserError, match=r"config.x=12 does not split .* 8 batch shards .*; use 8 or 16"):
        check_batch_divisible("config.x", 12, mesh)
    with pytest.raises(UserError, match=r"use 8$"):
        check_batch_divisible("config.x", 3, mesh)
