"""Operations on colors on the device: those of the host, to one level, drawn alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.augment import DEVICE_OPERATIONS, apply_color_operations
from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig, VisualConfig
from data_pipelines.digitworld import vocabulary_texts
from data_pipelines.errors import DataError
from data_pipelines.loader import Stream
from data_pipelines.tokenizers import train_wordpiece
from mplug2_jax.errors import UserError
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.parallel.placement import batch_sharding
from mplug2_jax.training import color_augment
from mplug2_jax.training.color_augment import augment_colors

TOKENIZER = train_wordpiece(vocabulary_texts(60), 160)
on_device = jax.jit(color_augment.apply_color_operations)


def clips(seed: int, count: int = 4) -> np.ndarray:
    """Return clips of different brightness and contrast; the first is of one color."""
    rng = np.random.default_rng(seed)
    low, span = rng.integers(0, 100, (count, 1, 1, 1, 3)), rng.integers(1, 156, (count, 1, 1, 1, 3))
    noise = rng.random((count, 2, 9, 7, 3))
    noise[0] = 0
    return (low + span * noise).astype(np.uint8)


def differences(frames: np.ndarray, operations: np.ndarray) -> np.ndarray:
    """Return by how much the device differs from the host, after one operation per clip."""
    expected = np.stack([apply_color_operations(clip, rows) for clip, rows in zip(frames, operations, strict=True)])
    return np.abs(np.asarray(on_device(jnp.asarray(frames), jnp.asarray(operations))).astype(int) - expected)


@given(
    seed=st.integers(0, 2**32 - 1),
    operations=st.lists(
        st.tuples(st.integers(-1, len(DEVICE_OPERATIONS) - 1), st.integers(-20, 20).map(lambda tenths: tenths / 20)),
        min_size=8,
        max_size=8,
    ),
)
@settings(max_examples=60, deadline=None)
def test_the_device_does_what_the_host_does_to_one_level(seed: int, operations: list[tuple[int, float]]) -> None:
    drawn = np.array(operations, np.float32).reshape(4, 2, 2)
    first = np.concatenate([drawn[:, :1], np.full_like(drawn[:, :1], -1)], 1)  # the next would enlarge a difference
    for each in (first, np.roll(first, 1, axis=1)):
        assert differences(clips(seed), each).max() <= 1


def test_few_colors_differ() -> None:
    """Pillow rounds some results that are whole numbers down: of single clips up to a third, of all one in 200."""
    rng = np.random.default_rng(0)
    shares = []
    for seed in range(40):
        numbers, levels = rng.integers(-1, len(DEVICE_OPERATIONS), 4), rng.integers(-20, 21, 4) / 20
        rows = np.stack([np.stack([numbers, levels], -1), np.full((4, 2), -1.0)], 1).astype(np.float32)
        shares.append((differences(clips(seed), rows) > 0).mean())
    assert np.mean(shares) < 0.005


def test_the_contrast_of_every_color_is_exact() -> None:
    """Compare with whole numbers, for ranges of which Pillow rounds many results down, and for random ones."""
    rng = np.random.default_rng(0)
    low = np.concatenate([[70, 35, 74, 97, 0], rng.integers(0, 100, 27)])
    high = np.concatenate([[79, 44, 149, 122, 255], low[5:] + rng.integers(1, 156, 27)])
    colors = np.clip(np.arange(256), low[:, None], high[:, None])
    expected = (colors - low[:, None]) * 255 // (high - low)[:, None]
    frames, rows = (np.repeat(x[:, None, None, :, None], 3, -1).astype(np.uint8) for x in (colors, expected))
    operation = np.array([[DEVICE_OPERATIONS.index("auto_contrast"), 0.5], [-1, 0]], np.float32)
    actual = on_device(jnp.asarray(frames), jnp.asarray(np.tile(operation, (len(low), 1, 1))))
    np.testing.assert_array_equal(np.asarray(actual), rows)


def config(kind: str = "video", **visual: object) -> DataConfig:
    settings = VisualConfig(image_size=16, num_frames=2, sampling="random", transform="train", **visual)
    sources = {"s": SourceConfig(kind=kind, max_records=64)}
    return DataConfig(sources=sources, visual=settings, examples=ExampleConfig(text_length=8), batch_size=64)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_draws_are_those_of_the_host_and_colors_come_last(kind: str) -> None:
    host, device = (
        Stream(config(kind, color_on_device=on), TOKENIZER, name="s", seed=0).batch(0).arrays for on in (False, True)
    )
    assert (
        device["color_operations"].shape == (64, 2, 2) == config(color_on_device=True).shapes()["color_operations"][0]
    )
    frames = device["frames"].copy()
    batch = {name: jnp.asarray(array) for name, array in device.items()}
    augmented = augment_colors(batch)
    assert augmented.keys() == host.keys()
    difference = np.abs(np.asarray(augmented["frames"]).astype(int) - host["frames"]).max((1, 2, 3, 4))
    counts = (device["color_operations"][..., 0] >= 0).sum(1)
    assert {0, 1, 2} == set(counts.tolist())
    assert (difference[counts == 0] == 0).all()
    np.testing.assert_array_equal(np.asarray(augmented["frames"])[counts == 0], frames[counts == 0])
    assert np.median(difference[counts == 2]) <= 2  # the second may enlarge a difference of one level
    assert augment_colors(augmented) is augmented


def test_sharded_clips_are_augmented_as_whole_ones() -> None:
    frames, rows = clips(3, 8), np.tile(np.array([[[0, 0.5], [4, -0.5]]], np.float32), (8, 1, 1))
    rows[::2, 0, 0] = 5
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1))
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(each, batch_sharding(mesh)) for each in (frames, rows)]
        actual = np.asarray(on_device(*sharded))
    np.testing.assert_array_equal(actual, np.asarray(on_device(jnp.asarray(frames), jnp.asarray(rows))))


def test_the_option_is_refused_where_nothing_would_apply_it() -> None:
    with pytest.raises(DataError, match="color_on_device needs operations of transform='train', found 'test' with num"):
        VisualConfig(color_on_device=True)
    data = config(color_on_device=True)
    with pytest.raises(DataError, match="found 'train' with num_ops=0; set it to False"):
        dataclasses.replace(data.visual, num_ops=0)
    message = "color augmentation on the device is for training only: set data.visual.color_on_device to False"
    with pytest.raises(UserError, match=message):
        EvaluationConfig(task="vlc", data=data)
