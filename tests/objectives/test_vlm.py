"""Vision-language matching: sampling of hard negatives, and the loss over them."""

import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2_jax.model.config import model_config
from mplug2_jax.model.fusion import Fusion
from mplug2_jax.model.prng import random_key
from mplug2_jax.objectives import group_gather
from mplug2_jax.objectives.config import VlmConfig
from mplug2_jax.objectives.forward import ForwardPass
from mplug2_jax.objectives.vlm import hard_negatives, vlm_loss
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.parallel.placement import batch_sharding
from tests.close import assert_close, assert_equal

BATCH, WIDTH = 12, 6


def case(seed, num_ids=5, padded=2, batch=BATCH):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(2, batch, WIDTH))
    features = (features / np.linalg.norm(features, axis=-1, keepdims=True)).astype(np.float32)
    weights = np.ones(batch, np.float32)
    weights[rng.permutation(batch)[:padded]] = 0
    ids = rng.integers(num_ids, size=batch).astype(np.int32)
    return tuple(jnp.asarray(x) for x in (features[0], features[1], ids, weights))


def sample_negatives(visual, text, ids, weights, rng=None, temperature=0.07, group=4):
    pair = (visual, text)
    return hard_negatives(pair, pair, ids, weights, jnp.asarray(temperature), group, rng)


jitted_sample = jax.jit(sample_negatives, static_argnames="group")


def batch_index(index, group):
    """Convert indices within groups to indices of the batch."""
    index = np.asarray(index)
    return (index + group * np.arange(len(index))[:, None]).reshape(-1)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31 - 1), num_ids=st.sampled_from([1, 2, 4, 100]), padded=st.integers(0, 12),
    group=st.sampled_from([4, 12]), sampled=st.booleans(),
)  # fmt: skip
def test_negatives_are_unpadded_group_members_with_another_id(seed, num_ids, padded, group, sampled):
    visual, text, ids, weights = case(seed, num_ids, padded)
    found = jitted_sample(visual, text, ids, weights, jax.random.key(seed) if sampled else None, group=group)
    ids, weights, exists = np.asarray(ids), np.asarray(weights), np.asarray(found[2]).reshape(-1)
    for i in range(BATCH):
        members = range(i // group * group, i // group * group + group)
        possible = {j for j in members if ids[j] != ids[i] and weights[i] and weights[j]}
        assert exists[i] == bool(possible)
        for index in found[:2]:
            assert 0 <= np.asarray(index).reshape(-1)[i] < group
            assert not possible or batch_index(index, group)[i] in possible


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31 - 1))
def test_the_most_similar_negative_is_taken_without_a_key_and_at_low_temperature(seed):
    visual, text, ids, weights = case(seed, padded=1)
    exists = np.asarray(jitted_sample(visual, text, ids, weights)[2]).reshape(-1)
    similarity = np.asarray(text) @ np.asarray(visual).T  # texts are rows
    same_group = np.arange(BATCH)[:, None] // 4 == np.arange(BATCH) // 4
    is_negative = same_group & (np.asarray(ids)[:, None] != np.asarray(ids)) & (np.asarray(weights) > 0)
    near = 1e-4  # rounding, and sampling at low temperature, decide between negatives that are so similar
    for rng, temperature in ((None, 0.07), (jax.random.key(seed), 1e-6)):
        found = jitted_sample(visual, text, ids, weights, rng, temperature)
        for index, matrix in zip(found[:2], (similarity, similarity.T), strict=True):
            possible = np.where(is_negative, matrix, -np.inf)
            chosen = possible[np.arange(BATCH), batch_index(index, 4)]
            assert (chosen[exists] >= possible.max(1)[exists] - near).all()


def test_sampling_is_proportional_to_softmax_of_similarity_over_temperature():
    visual, text, _, weights = case(1, padded=0, batch=4)
    ids, temperature, num_samples = jnp.asarray([0, 1, 0, 2]), 0.5, 4000
    sample = jax.jit(jax.vmap(lambda key: sample_negatives(visual, text, ids, weights, key, temperature)[:2]))
    images, texts = (np.asarray(x)[:, 0] for x in sample(jax.random.split(jax.random.key(0), num_samples)))
    scores = np.asarray(text) @ np.asarray(visual).T / temperature
    is_negative = np.asarray(ids)[:, None] != np.asarray(ids)
    for found, score in ((images, scores), (texts, scores.T)):
        expected = np.where(is_negative, np.exp(score), 0)
        expected /= expected.sum(1, keepdims=True)
        frequencies = np.stack([np.bincount(found[:, i], minlength=4) / num_samples for i in range(4)])
        assert np.abs(frequencies - expected).max() < 5 * np.sqrt(0.25 / num_samples)
    assert (images != texts).any()  # sampled independently


def test_sampling_does_not_depend_on_other_groups():
    visual, text, ids, weights = case(2)
    rng, first = jax.random.key(3), jnp.arange(BATCH) < 4
    before = jitted_sample(visual, text, ids, weights, rng)
    after = jitted_sample(
        jnp.where(first[:, None], visual, -visual), jnp.where(first[:, None], text, visual),
        jnp.where(first, ids, ids + 1), jnp.where(first, weights, 1.0), rng,
    )  # fmt: skip
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(before, after, strict=True))


def test_negatives_may_be_sampled_by_a_teachers_features():
    visual, text, ids, weights = case(5, num_ids=100, padded=0)
    student, teacher = (visual, text), (visual[::-1], text[::-1])
    negatives = jax.jit(hard_negatives, static_argnums=5)
    temperature = jnp.asarray(0.07)
    found = negatives(student, teacher, ids, weights, temperature, 4, None)
    is_negative = ~np.eye(4, dtype=bool)
    for index, rows, columns in ((found[0], text, teacher[0]), (found[1], visual, teacher[1])):
        scores = np.einsum("gie,gje->gij", rows.reshape(3, 4, -1), columns.reshape(3, 4, -1))
        np.testing.assert_array_equal(index, np.where(is_negative, scores, -np.inf).argmax(-1))


class FakeForward(ForwardPass):
    """Forward pass whose tokens carry example numbers, and whose logits of (text i, image j) are in a table."""

    def __init__(self, batch, features, table, rng=None):
        rows = len(batch["example_id"])
        self.batch, self.features, self.rng, self.teacher = batch, features, rng, None
        self.text = jnp.zeros((rows, 3, 2)).at[:, 0, 0].set(jnp.arange(rows))
        self.visual = jnp.zeros((rows, 5, 2)).at[:, 0, 0].set(jnp.arange(rows))
        self.model = types.SimpleNamespace(
            fusion=self.fusion, matching=lambda fused: jnp.where(fused[:, :1] < 0, jnp.nan, table[*fused.T]),
            contrastive=types.SimpleNamespace(temperature=jnp.asarray(0.07)),
        )  # fmt: skip

    def fusion(self, text, mask, visual, rng):
        """Return [text number, image number]; as in the model, texts that share an image are adjacent."""
        images = jnp.repeat(visual[:, 0, 0], len(text) // len(visual)).astype(int)
        numbers = text[:, 0, 0].astype(int)
        mask_matches = mask.sum(1) == numbers % 3 + 1
        return visual, jnp.where(mask_matches[:, None], jnp.stack([numbers, images], axis=1), -1)


def loss_and_negatives(batch, features, table, rng, group):
    forward = FakeForward(batch, features, table, rng)
    key = forward.key("vlm/negatives")
    weights = batch["example_mask"].astype(jnp.float32)
    negatives = sample_negatives(*features, batch["example_id"], weights, key, group=group or len(table))
    return vlm_loss(forward, VlmConfig(group_size=group)), negatives


loss_of = jax.jit(loss_and_negatives, static_argnames="group")


def pairs_to_match(seed, padded=0, num_ids=5, batch=BATCH):
    visual, text, ids, weights = case(seed, num_ids, padded, batch)
    arrays = {
        "text_mask": jnp.arange(3) < (jnp.arange(batch) % 3 + 1)[:, None],
        "example_id": ids,
        "example_mask": weights > 0,
    }
    return arrays, (visual, text), jax.random.normal(jax.random.key(seed), (batch, batch, 2))


@pytest.mark.parametrize("group", [4, 0])
def test_the_loss_is_over_positives_negative_images_and_negative_texts(group):
    batch, features, table = pairs_to_match(0, padded=3)
    result, (images, texts, exists) = loss_of(batch, features, table, jax.random.key(0), group)
    images, texts = (batch_index(index, group or BATCH) for index in (images, texts))
    losses, hits = [], []
    for i in np.flatnonzero(batch["example_mask"]):
        pairs = [(i, i, 1)]
        if np.asarray(exists).reshape(-1)[i]:
            pairs += [(texts[i], i, 0), (i, images[i], 0)]
        for text, image, label in pairs:
            logits = np.asarray(table[text, image], np.float64)
            losses.append(np.log(np.exp(logits).sum()) - logits[label])
            hits.append(logits.argmax() == label)
    assert_close(result.loss, np.mean(losses))
    assert_close(result.metrics["accuracy"], np.mean(hits))


def test_without_groups_negatives_come_from_the_whole_batch():
    batch, features, table = pairs_to_match(0, num_ids=1000)
    _, (images, texts, exists) = loss_of(batch, features, table, jax.random.key(0), 0)
    assert images.shape == texts.shape == exists.shape == (1, BATCH)
    assert (np.abs(np.asarray(images) - np.arange(BATCH)) >= 4).any()


def test_examples_without_a_negative_are_positives_only():
    batch, features, table = pairs_to_match(1, num_ids=1)
    positive = np.asarray(table, np.float64)[np.arange(BATCH), np.arange(BATCH)]
    expected = (np.log(np.exp(positive).sum(1)) - positive[:, 1]).mean()
    assert_close(loss_of(batch, features, table, jax.random.key(0), 4)[0].loss, expected)


def test_no_gradient_flows_through_the_sampling():
    batch, features, table = pairs_to_match(2)

    def loss(features, table):
        return loss_and_negatives(batch, features, table, jax.random.key(0), 4)[0].loss

    to_features, to_table = jax.jit(jax.grad(loss, argnums=(0, 1)))(features, table)
    np.testing.assert_array_equal(to_features, np.zeros((2, BATCH, WIDTH)))
    assert float(jnp.abs(to_table).max()) > 0


@pytest.mark.parametrize("stride", [0, 1])
def test_texts_that_share_an_image_are_fused_as_with_copies_of_it(stride):
    config = model_config(
        "tiny", dtype="float32", width=16, heads=2, mlp_width=16, fusion_layers=2, fusion_stride=stride
    )  # fmt: skip
    with nnx.use_eager_sharding(False):
        graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Fusion(config, rngs=nnx.Rngs(0))), nnx.Param)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.3, jnp.float32), shapes)
    texts, images = jnp.asarray(rng.normal(size=(6, 3, 16))), jnp.asarray(rng.normal(size=(3, 5, 16)))
    mask = jnp.arange(3) < jnp.asarray([[3], [1], [2], [3], [3], [2]])
    fuse = jax.jit(lambda *args: nnx.merge(graphdef, params)(*args)[1])
    copies = jnp.repeat(images, 2, axis=0)
    assert_close(fuse(texts, mask, images), fuse(texts, mask, copies))
    assert float(jnp.abs(fuse(texts, mask, images) - fuse(texts, mask, copies[::-1])).max()) > 1e-2


class TokenForward(ForwardPass):
    """Forward pass of given tokens, whose fusion depends on all of them."""

    def __init__(self, batch, features, text, visual, rng):
        self.batch, self.features, self.rng, self.teacher = batch, features, rng, None
        self.text, self.visual = text, visual
        self.model = types.SimpleNamespace(
            fusion=self.fusion, matching=lambda fused: fused[:, :2],
            contrastive=types.SimpleNamespace(temperature=jnp.asarray(0.07)),
        )  # fmt: skip

    @staticmethod
    def fusion(text, mask, visual, rng):
        images = jnp.repeat(visual, len(text) // len(visual), axis=0)
        return visual, jnp.sin((text * mask[:, :, None]).sum(1)) * jnp.cos(images).sum(1)


BIG, TEXT, VISUAL = 64, (3, 8), (5, 8)  # pairs, and lengths and widths of their tokens


@functools.partial(jax.jit, static_argnames="group")
@functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
def token_loss(text, visual, batch, features, group):
    forward = TokenForward(batch, features, text, visual, random_key(11))
    key, weights = forward.key("vlm/negatives"), forward.example_weights
    negatives = sample_negatives(*features, batch["example_id"], weights, key, group=group or len(weights))
    return vlm_loss(forward, VlmConfig(group_size=group)).loss, negatives


@functools.cache
def tokens_to_match(group):
    """Return the arguments of ``token_loss``, and its result on one device."""
    batch, features, _ = pairs_to_match(7, padded=5, num_ids=20, batch=BIG)
    text, visual = (jax.random.normal(jax.random.key(i), (BIG, *shape)) for i, shape in enumerate((TEXT, VISUAL)))
    arguments = (text, visual, batch, features)
    return arguments, token_loss(*arguments, group)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=8, fsdp=1),
        MeshConfig(data=2, fsdp=4),
        MeshConfig(data=4, fsdp=1, sequence=2),
        MeshConfig(replica=2, fsdp=2, tensor=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("group", [4, 32, 0])  # of one chip, of several, of all
def test_a_mesh_changes_neither_negatives_nor_loss_nor_gradient(mesh, group, monkeypatch):
    monkeypatch.setattr(group_gather, "_MAX_GATHERED_BYTES", 4 * BIG * VISUAL[1])  # one of five slices
    arguments, ((expected, negatives), expected_grads) = tokens_to_match(group)
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        program = token_loss.lower(*jax.device_put(arguments, batch_sharding(mesh)), group).compile()
        (loss, found), grads = program(*jax.device_put(arguments, batch_sharding(mesh)))
    assert_equal(found, negatives)
    assert_close(loss, expected)
    assert_close(grads, expected_grads)
    # No chip has the scores of all pairs, nor the tokens of all images or texts.
    shapes = re.findall(r"\b[a-z]+[0-9]*\[([0-9,]+)\]", program.as_text())
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest < min(BIG * BIG, BIG * math.prod(TEXT))
