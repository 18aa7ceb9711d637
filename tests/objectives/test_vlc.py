"""Vision-language contrast against plain formulas, on any mesh, and its memory on 8 to 4,096 chips."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from mplug2_jax.objectives import contrast
from mplug2_jax.objectives.config import VlcConfig
from mplug2_jax.objectives.forward import ForwardPass
from mplug2_jax.objectives.queue import Queue, init_queue
from mplug2_jax.objectives.vlc import contrastive_loss, momentum_contrastive_loss, vlc_loss
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import abstract_mesh, make_mesh
from mplug2_jax.parallel.placement import batch_sharding
from tests.close import assert_close
from tests.tpu import topology_mesh

WIDTH = 8


def pairs(batch, seed, num_ids, padded=0):
    """Unit features, ids (some equal where there are few), counts (some 0) and a temperature."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(2, batch, WIDTH))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    counts = np.ones(batch, np.float32)
    counts[rng.permutation(batch)[:padded]] = 0
    ids = rng.integers(num_ids, size=batch)
    return features[0].astype(np.float32), features[1].astype(np.float32), ids, counts, np.float32(0.07)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def reference(visual, text, ids, counts, temperature):
    """In float64: padding cut away, then for each row the mean cross entropy over the columns with its id."""
    kept = counts > 0
    visual, text, ids = np.asarray(visual, np.float64)[kept], np.asarray(text, np.float64)[kept], ids[kept]
    target = (ids[:, None] == ids[None]).astype(np.float64)
    target /= target.sum(1, keepdims=True)
    scores = visual @ text.T / float(temperature)
    return -((target * log_softmax(scores)).sum(1).mean() + (target * log_softmax(scores.T)).sum(1).mean()) / 2


loss_of = jax.jit(contrastive_loss)


def test_a_hand_computed_case():
    unit = np.eye(2, dtype=np.float32)
    loss = loss_of(unit, unit, np.arange(2), np.ones(2, np.float32), np.float32(0.5))
    assert_close(loss, np.log(1 + np.exp(-2.0)))  # softmax of (2, 0), all four times


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), num_ids=st.sampled_from([2, 5, 10**6]), padded=st.integers(0, 11))
def test_the_loss_is_the_plain_formula(seed, num_ids, padded):
    case = pairs(12, seed, num_ids, padded)
    assert_close(loss_of(*case), reference(*case), scale=1 / case[-1])  # of the scores


def plain(visual, text, ids, counts, temperature):
    """One matrix, in a few lines of JAX: something for gradients to be compared with."""
    scores = visual @ text.T / temperature
    target = (ids[:, None] == ids) * counts

    def direction(scores):
        total = jax.nn.logsumexp(jnp.where(counts > 0, scores, -1e30), axis=1)
        losses = total - (target * scores).sum(1) / jnp.maximum(target.sum(1), 1)
        return (losses * counts).sum() / counts.sum()

    return (direction(scores) + direction(scores.T)) / 2


plain_value_and_gradient = jax.jit(jax.value_and_grad(plain, argnums=(0, 1, 4)))


def test_equal_ids_are_positives_of_equal_weight():
    visual, text, _, counts, temperature = pairs(6, 0, 1)
    ids = np.asarray([0, 1, 0, 2, 3, 4])
    swapped = text[[2, 1, 0, 3, 4, 5]]  # which of two texts with the same id stands beside which picture is no matter
    assert_close(loss_of(visual, swapped, ids, counts, temperature), loss_of(visual, text, ids, counts, temperature))
    apart = loss_of(visual, text, np.arange(6), counts, temperature)
    assert abs(apart - loss_of(visual, text, ids, counts, temperature)) > 1e-3


def test_padding_has_neither_influence_nor_gradient():
    visual, text, ids, counts, temperature = pairs(12, 1, 4, padded=5)
    padding = counts == 0
    value_and_gradient = jax.jit(jax.value_and_grad(contrastive_loss, argnums=(0, 1)))
    value, gradient = value_and_gradient(visual, text, ids, counts, temperature)
    for part in gradient:
        np.testing.assert_array_equal(part[padding], 0)
        assert (np.abs(part[~padding]).max(-1) > 0).all()
    loud_visual, loud_text, other_ids = visual.copy(), text.copy(), ids.copy()
    loud_visual[padding], loud_text[padding], other_ids[padding] = 100.0, -100.0, ids[~padding][0]
    loud_value, loud_gradient = value_and_gradient(loud_visual, loud_text, other_ids, counts, temperature)
    np.testing.assert_array_equal(loud_value, value)
    np.testing.assert_array_equal(loud_gradient, gradient)


def test_a_batch_of_nothing_but_padding_is_worth_nothing():
    visual, text, ids, counts, temperature = pairs(4, 0, 4)
    loss, gradient = jax.jit(jax.value_and_grad(contrastive_loss))(visual, text, ids, 0 * counts, temperature)
    assert float(loss) == 0
    np.testing.assert_array_equal(gradient, 0)


def test_pictures_and_texts_play_the_same_part():
    visual, text, ids, counts, temperature = pairs(12, 2, 8, padded=2)
    assert_close(loss_of(text, visual, ids, counts, temperature), loss_of(visual, text, ids, counts, temperature))


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(tensor=8, fsdp=1),  # no ring at all
        MeshConfig(fsdp=8),
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(replica=2, data=2, fsdp=2),
        MeshConfig(replica=8, fsdp=1),
        MeshConfig(replica=2, fsdp=2, tensor=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("block_chips", [1, 2, 8])
def test_meshes_and_blocks_change_neither_value_nor_gradient(mesh, block_chips, monkeypatch):
    monkeypatch.setattr(contrast, "_BLOCK_CHIPS", block_chips)
    case = pairs(64, 3, 40, padded=5)
    expected = plain_value_and_gradient(*case)
    devices = make_mesh(mesh)
    rows = batch_sharding(devices)
    placed = [jax.device_put(x, rows if np.ndim(x) else NamedSharding(devices, PartitionSpec())) for x in case]
    with jax.set_mesh(devices):
        ours = jax.jit(jax.value_and_grad(lambda *x: contrastive_loss(*x), argnums=(0, 1, 4)))(*placed)
    assert_close(ours, expected)


@pytest.mark.parametrize(
    ("devices", "rows", "turns"),
    [(4, 32, 1), (8, 32, 2), (6, 32, 3), (7, 32, 7), (8, 2048, 4), (8, 8192, 8)],  # 4 chips, and 4,096 rows, at most
)
def test_blocks_are_those_of_few_chips(devices, rows, turns):
    mesh = abstract_mesh(MeshConfig(fsdp=devices), devices)
    seen = []

    def look(x):
        seen.append(contrast._ring_of(("fsdp",), len(x)).turns)
        return x

    look = jax.shard_map(look, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"))
    jax.eval_shape(look, jax.ShapeDtypeStruct((devices * rows,), "float32"))
    assert seen == [turns]


class Prepared(ForwardPass):
    """A forward pass whose features are known; no model runs."""

    def __init__(self, batch, features, temperature=0.07, teacher=None, alpha=0.0, queue=None):
        self.batch, self.features, self.rng = batch, features, None
        self.model = types.SimpleNamespace(contrastive=types.SimpleNamespace(temperature=jnp.asarray(temperature)))
        self.teacher, self.alpha, self.queue = teacher, alpha, queue


def test_the_objective_reads_features_ids_and_padding_of_the_batch_and_floors_the_temperature():
    visual, text, ids, counts, _ = pairs(6, 6, 4, padded=2)
    batch = {"example_id": jnp.asarray(ids), "example_mask": jnp.asarray(counts > 0)}
    forward = Prepared(batch, (jnp.asarray(visual), jnp.asarray(text)))
    for floor, temperature in ((0.01, 0.07), (0.5, 0.5)):
        outcome = vlc_loss(forward, VlcConfig(min_temperature=floor))
        assert_close(outcome.loss, reference(visual, text, ids, counts, temperature))
        assert_close(outcome.metrics["temperature"], temperature)
        assert outcome.queue is None


def test_a_teacher_and_a_queue_turn_the_objective_into_the_momentum_form():
    visual, text, ids, _, _ = pairs(4, 7, 3)
    own, theirs = (jnp.asarray(visual), jnp.asarray(text)), (jnp.asarray(text), jnp.asarray(visual[::-1]))
    batch, (visual, text, others, _, _) = {"example_id": jnp.asarray(ids, jnp.int32)}, pairs(8, 9, 3)
    queue = Queue(jnp.asarray(visual), jnp.asarray(text), jnp.asarray(others, jnp.int32), jnp.int32(0))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def run(own, theirs):
        outcome = vlc_loss(Prepared(batch, own, 0.07, Prepared(batch, theirs), 0.4, queue), VlcConfig())
        return outcome.loss, outcome

    (_, to_teacher), outcome = run(own, theirs)
    assert_close(outcome.loss, momentum_reference(own, theirs, ids, queue, 0.07, 0.4))
    np.testing.assert_array_equal(outcome.queue.visual[:4], theirs[0])
    np.testing.assert_array_equal(outcome.queue.text[:4], theirs[1])
    np.testing.assert_array_equal(outcome.queue.ids, [*ids, *others[4:]])
    np.testing.assert_array_equal(to_teacher, np.zeros((2, 4, WIDTH)))


def momentum_reference(student, teacher, ids, queue, temperature, alpha):
    """mPLUG v1's formula in float64."""
    (own_visual, own_text), (their_visual, their_text) = (
        [np.asarray(x, np.float64) for x in features] for features in (student, teacher)
    )
    visuals = np.concatenate([their_visual, np.asarray(queue.visual, np.float64)])
    texts = np.concatenate([their_text, np.asarray(queue.text, np.float64)])
    hard = (ids[:, None] == np.concatenate([ids, np.asarray(queue.ids)])).astype(np.float64)
    hard /= hard.sum(1, keepdims=True)
    losses = []
    for own, their, others in ((own_visual, their_visual, texts), (own_text, their_text, visuals)):
        target = alpha * np.exp(log_softmax(their @ others.T / temperature)) + (1 - alpha) * hard
        losses.append(-(target * log_softmax(own @ others.T / temperature)).sum(1).mean())
    return sum(losses) / 2


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), num_ids=st.sampled_from([3, 10**6]), alpha=st.sampled_from([0.0, 0.4, 1.0]))
def test_the_momentum_loss_is_the_releases_formula(seed, num_ids, alpha):
    visual, text, ids, _, temperature = pairs(6, seed, num_ids)
    their_visual, their_text, queued_ids, _, _ = pairs(18, seed + 1, num_ids)
    queue = Queue(
        jnp.asarray(their_visual[6:]), jnp.asarray(their_text[6:]), jnp.asarray(queued_ids[6:], jnp.int32), jnp.int32(0)
    )
    teacher = (their_visual[:6], their_text[:6])
    loss = jax.jit(momentum_contrastive_loss)((visual, text), teacher, ids, queue, temperature, alpha)
    expected = momentum_reference((visual, text), teacher, ids, queue, float(temperature), alpha)
    assert_close(loss, expected, scale=1 / temperature)  # of the scores


def test_a_hand_computed_momentum_case():
    """One pair and a queue of one stranger, all orthogonal but the pair: scores (1, 0) / 0.5 on both sides."""
    pair, stranger = jnp.asarray([[1.0, 0.0]]), jnp.asarray([[0.0, 1.0]])
    queue = Queue(stranger, stranger, jnp.asarray([-100]), jnp.int32(0))
    both = (pair, pair)
    loss = functools.partial(momentum_contrastive_loss, both, both, jnp.asarray([3]), queue, jnp.asarray(0.5))
    p = np.exp(2) / (np.exp(2) + 1)
    assert_close(loss(0.0), -np.log(p))
    assert_close(loss(1.0), -p * np.log(p) - (1 - p) * np.log(1 - p))
    assert_close(loss(0.25), 0.75 * loss(0.0) + 0.25 * loss(1.0))


def test_the_momentum_loss_gives_its_teacher_no_gradient():
    visual, text, ids, _, temperature = (jnp.asarray(x) for x in pairs(6, 8, 3))
    gradient = jax.jit(jax.grad(momentum_contrastive_loss, argnums=(0, 1)))
    queue = Queue(text, visual, ids + 1, jnp.int32(0))
    to_student, to_teacher = gradient((visual, text), (text, visual), ids, queue, temperature, 0.4)
    np.testing.assert_array_equal(to_teacher, np.zeros((2, 6, WIDTH)))
    assert np.abs(to_student).max(-1).min() > 0


def test_with_alpha_0_and_an_empty_queue_the_momentum_form_is_the_plain_contrast():
    visual, text, ids, counts, temperature = (jnp.asarray(x) for x in pairs(6, 5, 3))
    nothing = jnp.zeros((0, WIDTH))
    queue = Queue(nothing, nothing, jnp.zeros(0, jnp.int32), jnp.int32(0))
    momentum = momentum_contrastive_loss((visual, text), (visual, text), ids, queue, temperature, 0.0)
    assert_close(momentum, loss_of(visual, text, ids, counts, temperature))


def test_a_queue_forgets_its_oldest_and_begins_again_at_its_end():
    queue = init_queue(jax.random.key(0), 6, WIDTH)
    assert_close(np.linalg.norm(queue.visual, axis=-1), np.ones(6))
    assert (queue.ids == -100).all()
    push = jax.jit(Queue.push)
    first = queue.text
    for i in range(4):
        rows = jnp.full((2, WIDTH), float(i))
        queue = push(queue, rows, -rows, jnp.asarray([2 * i, 2 * i + 1], jnp.int32))
        assert int(queue.pointer) == 2 * (i + 1) % 6
        if i == 0:
            np.testing.assert_array_equal(queue.text[2:], first[2:])
    np.testing.assert_array_equal(queue.ids, [6, 7, 2, 3, 4, 5])
    np.testing.assert_array_equal(queue.visual[:, 0], [3, 3, 1, 1, 2, 2])
    np.testing.assert_array_equal(queue.text[:, 0], [-3, -3, -1, -1, -2, -2])


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_memory_per_chip_does_not_change_with_the_number_of_chips():
    memory = []
    for topology in ("v5p:2x2x2", "v5p:4x4x4", "v5p:16x16x16"):
        mesh = topology_mesh(topology, MeshConfig())
        rows, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
        batch = 32 * mesh.size

        def shape(*dims, dtype="float32", sharding=rows):
            return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

        features = shape(batch, 256)
        case = (features, features, shape(batch, dtype="int32"), shape(batch), shape(sharding=whole))
        with jax.set_mesh(mesh):
            run = jax.jit(jax.value_and_grad(contrastive_loss, argnums=(0, 1, 4)))
            memory.append(run.lower(*case).compile().memory_analysis())
    for analysis in memory:
        assert analysis.temp_size_in_bytes == pytest.approx(memory[0].temp_size_in_bytes, rel=0.05)
        # Features come in, and their gradients go out, as shards.
        assert analysis.argument_size_in_bytes == memory[0].argument_size_in_bytes < 2**20
        assert analysis.output_size_in_bytes == memory[0].output_size_in_bytes < 2**20
