import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mplug2_jax.errors import UserError
from mplug2_jax.model.config import model_config
from mplug2_jax.model.vision import (
    LocalTemporal,
    VisionTower,
    frame_sharding,
    normalize_pixels,
    resize_positions,
    sincos_positions,
)
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.parallel.placement import batch_sharding
from mplug2_jax.planning.traffic import parse_collectives
from tests.close import assert_close

CONFIG = model_config("tiny", dtype="float32", vision_width=32, vision_layers=2)


@functools.cache
def tower(config=CONFIG, temporal=True):
    with nnx.use_eager_sharding(False):
        built = VisionTower(config, temporal=temporal, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(built, nnx.Param)
    # New temporal units are the identity, because their up-projection is zero: perturb all parameters.
    params = jax.tree.map(lambda p: p + 0.02 * jax.random.normal(jax.random.key(1), p.shape), params)
    return nnx.merge(graphdef, params)


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, params, clip):
    return nnx.merge(graphdef, params)(clip)


def run(model, clip):
    return _run(*nnx.split(model, nnx.Param), clip)


@pytest.mark.parametrize(("grid", "width"), [(4, 128), (3, 32), (16, 30)])
def test_initial_sincos_positions_differ_by_row_and_column_and_are_of_unit_scale(grid, width):
    table = np.asarray(sincos_positions(jax.random.key(0), (grid * grid + 1, width)))
    assert not table[0].any(), "the class token has no place"
    used = 4 * (width // 4)
    assert not table[:, used:].any()
    by_place = table[1:, :used].reshape(grid, grid, 2, used // 2)
    assert_close(by_place[:, :, 0], np.broadcast_to(by_place[:1, :, 0], by_place[:, :, 0].shape))  # x
    assert_close(by_place[:, :, 1], np.broadcast_to(by_place[:, :1, 1], by_place[:, :, 1].shape))  # y
    assert_close(np.mean(table[1:, :used] ** 2, axis=1), np.full(grid * grid, 0.5))
    assert len(np.unique(table.round(4), axis=0)) == len(table)


def test_the_config_chooses_initial_positions():
    tables = {
        kind: np.asarray(tower(dataclasses.replace(CONFIG, positions_init=kind)).positions[...])
        for kind in ("normal", "sincos", "zeros")
    }
    scales = {kind: float(table[1:].std()) for kind, table in tables.items()}  # perturbed by 0.02
    assert scales["zeros"] < scales["normal"] < 0.05 < scales["sincos"]


def frames_of(b, t):
    return frames(b=b, t=t)


def frames(b=2, t=3, size=32, seed=0):
    return jax.random.normal(jax.random.key(seed), (b, t, size, size, 3))


def test_position_tables_are_resized_as_in_the_release(reference):
    golden = np.load(reference / "goldens" / "recipe_pixels.npz")
    for name in golden:
        if name.startswith("posemb_out_"):
            grid = int(name.removeprefix("posemb_out_").split("x")[0])
            resized = resize_positions(jnp.asarray(golden["posemb_in"]), grid)
            assert_close(resized, golden[name].reshape(resized.shape))


def test_pixels_are_normalized_as_in_clip():
    bytes_ = jnp.asarray([[[[[0, 128, 255]]]]], jnp.uint8)
    expected = [(0 - 0.48145466) / 0.26862954, (128 / 255 - 0.4578275) / 0.26130258, (1 - 0.40821073) / 0.27577711]
    assert_close(normalize_pixels(bytes_)[0, 0, 0, 0], expected)


def test_the_temporal_unit_is_a_depthwise_convolution_over_time():
    with nnx.use_eager_sharding(False):
        unit = LocalTemporal(CONFIG, rngs=nnx.Rngs(0))
    unit.up.kernel[...] = jax.random.normal(jax.random.key(1), unit.up.kernel.shape)
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 32))
    y = unit.down(unit.norm(x))
    convolved = jax.lax.conv_general_dilated(
        y.transpose(0, 2, 1, 3).reshape(8, 5, 16), unit.kernel[...][:, None, :], (1,), ((1, 1),),
        dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=16,
    )  # fmt: skip
    convolved = convolved.reshape(2, 4, 5, 16).transpose(0, 2, 1, 3) + unit.bias[...]
    expected = unit.up(convolved * jax.nn.sigmoid(1.702 * convolved))
    assert_close(unit(x.reshape(10, 4, 32), frames=5), expected.reshape(10, 4, 32))


@pytest.mark.parametrize(
    ("clips", "frames", "clip_shards", "communicates"),
    [(8, 4, 1, False), (4, 4, 2, True), (4, 3, 1, False), (16, 3, 1, False)],
    ids=["enough clips", "few clips", "few odd clips", "enough odd clips"],
)
def test_clips_are_sharded_between_frames_only_if_there_are_too_few(clips, frames, clip_shards, communicates):
    clip, mesh = frames_of(clips, frames), make_mesh(MeshConfig(data=4, fsdp=1, sequence=2))
    expected = run(tower(), clip)
    with jax.set_mesh(mesh):
        assert frame_sharding(clips, frames)[1] == clip_shards
        graphdef, params = nnx.split(tower(), nnx.Param)
        placed = jax.device_put(clip, batch_sharding(mesh))
        compiled = jax.jit(lambda p, c: nnx.merge(graphdef, p)(c)).lower(params, placed).compile()
        assert_close(compiled(params, placed), expected)
    kinds = {c.kind for c in parse_collectives(compiled.as_text(), mesh) if "temporal" in c.scope}
    assert ("collective-permute" in kinds) == communicates
    assert "all-to-all" not in kinds


def without_temporal(model):
    """Return the model with temporal units that are the identity."""
    graphdef, params = nnx.split(model, nnx.Param)
    zero_units = lambda path, p: p * 0 if {"temporal_1", "temporal_2"} & set(path) else p  # noqa: E731
    return nnx.merge(graphdef, nnx.map_state(zero_units, params))


def test_images_skip_the_temporal_units():
    images = frames(t=1)
    np.testing.assert_array_equal(run(tower(), images), run(without_temporal(tower()), images))
    clip = frames(t=2)
    assert float(jnp.abs(run(tower(), clip) - run(without_temporal(tower()), clip)).max()) > 1e-3


def test_without_temporal_units_frames_are_independent():
    clip = frames()
    batched = run(without_temporal(tower()), clip)[:, 1:]
    separate = [run(tower(), clip[:, i : i + 1])[:, 1:] for i in range(3)]
    assert_close(batched, jnp.concatenate(separate, axis=1))


def test_a_block_propagates_a_change_to_two_adjacent_frames():
    one_block = tower(model_config("tiny", dtype="float32", vision_width=32, vision_layers=1))
    clip = frames(t=7)
    changed = clip.at[:, 0].add(1.0)
    difference = np.abs(run(one_block, changed) - run(one_block, clip))[:, 1:].reshape(2, 7, -1).max((0, 2))
    assert (difference[:3] > 1e-4).all()  # two temporal units per block, one frame each
    np.testing.assert_array_equal(difference[3:], 0)


@pytest.mark.parametrize("t", [1, 2, 5])
@pytest.mark.parametrize("size", [24, 32, 40])
def test_any_number_of_frames_of_any_square_size(t, size):
    out = run(tower(), frames(t=t, size=size))
    assert out.shape == (2, CONFIG.num_visual_tokens(t, size), 32)
    assert jnp.isfinite(out).all()


def test_patch_embedding_is_a_strided_convolution():
    model, images = tower(), frames(t=1)
    kernel = model.patch.kernel[...].reshape(8, 8, 3, 32)
    convolved = jax.lax.conv_general_dilated(
        images[:, 0], kernel, (8, 8), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert_close(model.patch(model._patches(images))[:, 0], convolved.reshape(2, 16, 32))


@pytest.mark.parametrize("t", [1, 2, 4, 5])
def test_temporal_downsampling_is_a_strided_convolution_over_time(t):
    model = tower(model_config("tiny", dtype="float32", vision_width=32, vision_layers=1, temporal_downsampling=True))
    clip = frames(t=t)
    kernel = model.patch.kernel[...].reshape(3, 8, 8, 3, 32)
    convolved = jax.lax.conv_general_dilated(
        clip, kernel, (2, 8, 8), ((1, 1), (0, 0), (0, 0)), dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    patches = model.patch(model._patches(clip))
    assert_close(patches, convolved.reshape(2, -1, 16, 32))
    assert run(model, clip).shape[1] == 1 + 16 * ((t - 1) // 2 + 1)


@pytest.mark.parametrize(("shape", "message"), [((1, 1, 32, 24, 3), "32x24"), ((1, 1, 30, 30, 3), "multiple of 8")])
def test_frames_of_an_invalid_shape_are_refused(shape, message):
    with pytest.raises(UserError, match=message):
        tower()(jnp.zeros(shape))


def test_clips_need_temporal_units():
    with pytest.raises(UserError, match="clips of 3 frames need the part 'temporal'"):
        tower(temporal=False)(frames())
