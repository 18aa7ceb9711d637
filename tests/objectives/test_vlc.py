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
from mplug2_jax.objectives.vlm import hard_negatives
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import abstract_mesh, make_mesh
from mplug2_jax.parallel.placement import batch_sharding
from mplug2_jax.training.telemetry.flops import _inner_jaxprs
from tests.close import assert_close
from tests.tpu import topology_mesh

WIDTH = 8


def pairs(batch, seed, num_ids, padded=0):
    """Return unit features, ids (with duplicates if ``num_ids`` is small), weights (0 for padding), a temperature."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(2, batch, WIDTH))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    weights = np.ones(batch, np.float32)
    weights[rng.permutation(batch)[:padded]] = 0
    ids = rng.integers(num_ids, size=batch)
    return features[0].astype(np.float32), features[1].astype(np.float32), ids, weights, np.float32(0.07)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def reference(visual, text, ids, weights, temperature):
    """Compute in float64, without padding, the mean cross entropy of each row over the columns with its id."""
    valid = weights > 0
    visual, text, ids = np.asarray(visual, np.float64)[valid], np.asarray(text, np.float64)[valid], ids[valid]
    target = (ids[:, None] == ids[None]).astype(np.float64)
    target /= target.sum(1, keepdims=True)
    scores = visual @ text.T / float(temperature)
    return -((target * log_softmax(scores)).sum(1).mean() + (target * log_softmax(scores.T)).sum(1).mean()) / 2


loss_of = jax.jit(contrastive_loss)


def test_a_hand_computed_case():
    features = np.eye(2, dtype=np.float32)
    loss = loss_of(features, features, np.arange(2), np.ones(2, np.float32), np.float32(0.5))
    assert_close(loss, np.log(1 + np.exp(-2.0)))  # softmax of (2, 0), all four times


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), num_ids=st.sampled_from([2, 5, 10**6]), padded=st.integers(0, 11))
def test_the_loss_matches_a_plain_formula(seed, num_ids, padded):
    case = pairs(12, seed, num_ids, padded)
    assert_close(loss_of(*case), reference(*case), scale=1 / case[-1])  # of the scores


def dense_loss(visual, text, ids, weights, temperature):
    """Compute the loss from one dense matrix in JAX, as a reference for gradients."""
    scores = visual @ text.T / temperature
    target = (ids[:, None] == ids) * weights

    def direction(scores):
        total = jax.nn.logsumexp(jnp.where(weights > 0, scores, -1e30), axis=1)
        losses = total - (target * scores).sum(1) / jnp.maximum(target.sum(1), 1)
        return (losses * weights).sum() / weights.sum()

    return (direction(scores) + direction(scores.T)) / 2


dense_value_and_grad = jax.jit(jax.value_and_grad(dense_loss, argnums=(0, 1, 4)))


def test_equal_ids_are_positives_of_equal_weight():
    visual, text, _, weights, temperature = pairs(6, 0, 1)
    ids = np.asarray([0, 1, 0, 2, 3, 4])
    swapped = text[[2, 1, 0, 3, 4, 5]]  # texts with the same id are interchangeable
    assert_close(loss_of(visual, swapped, ids, weights, temperature), loss_of(visual, text, ids, weights, temperature))
    distinct = loss_of(visual, text, np.arange(6), weights, temperature)
    assert abs(distinct - loss_of(visual, text, ids, weights, temperature)) > 1e-3


def test_padding_has_no_effect_and_no_gradient():
    visual, text, ids, weights, temperature = pairs(12, 1, 4, padded=5)
    padding = weights == 0
    value_and_grad = jax.jit(jax.value_and_grad(contrastive_loss, argnums=(0, 1)))
    value, grads = value_and_grad(visual, text, ids, weights, temperature)
    for grad in grads:
        np.testing.assert_array_equal(grad[padding], 0)
        assert (np.abs(grad[~padding]).max(-1) > 0).all()
    noisy_visual, noisy_text, other_ids = visual.copy(), text.copy(), ids.copy()
    noisy_visual[padding], noisy_text[padding], other_ids[padding] = 100.0, -100.0, ids[~padding][0]
    noisy_value, noisy_grads = value_and_grad(noisy_visual, noisy_text, other_ids, weights, temperature)
    np.testing.assert_array_equal(noisy_value, value)
    np.testing.assert_array_equal(noisy_grads, grads)


def test_the_loss_of_a_batch_of_padding_is_0():
    visual, text, ids, weights, temperature = pairs(4, 0, 4)
    loss, grad = jax.jit(jax.value_and_grad(contrastive_loss))(visual, text, ids, 0 * weights, temperature)
    assert float(loss) == 0
    np.testing.assert_array_equal(grad, 0)


def test_the_loss_is_symmetric_in_images_and_texts():
    visual, text, ids, weights, temperature = pairs(12, 2, 8, padded=2)
    assert_close(loss_of(text, visual, ids, weights, temperature), loss_of(visual, text, ids, weights, temperature))


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(tensor=8, fsdp=1),  # no ring
        MeshConfig(fsdp=8),
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(replica=2, data=2, fsdp=2),
        MeshConfig(replica=8, fsdp=1),
        MeshConfig(replica=2, fsdp=2, tensor=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("block_chips", [0, 1, 2, 8])
def test_meshes_and_block_sizes_do_not_change_value_and_gradient(mesh, block_chips, monkeypatch):
    if block_chips:  # 0: all are gathered
        monkeypatch.setattr(contrast, "_MAX_GATHERED_BYTES", 0)
        monkeypatch.setattr(contrast, "_MAX_BLOCK_CHIPS", block_chips)
    case = pairs(64, 3, 40, padded=5)
    expected = dense_value_and_grad(*case)
    device_mesh = make_mesh(mesh)
    rows = batch_sharding(device_mesh)
    placed = [jax.device_put(x, rows if np.ndim(x) else NamedSharding(device_mesh, PartitionSpec())) for x in case]
    with jax.set_mesh(device_mesh):
        found = jax.jit(jax.value_and_grad(lambda *x: contrastive_loss(*x), argnums=(0, 1, 4)))(*placed)
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("devices", "rows", "num_steps"),
    [(4, 32, 1), (8, 32, 2), (6, 32, 3), (7, 32, 7), (8, 2048, 4), (8, 8192, 8)],  # at most 4 chips and 4,096 rows
)
def test_block_sizes_are_bounded(devices, rows, num_steps, monkeypatch):
    assert num_steps_of(devices, rows) == 1  # 1 MiB of features at most
    monkeypatch.setattr(contrast, "_MAX_GATHERED_BYTES", 4 * WIDTH * devices * rows - 1)
    assert num_steps_of(devices, rows) == num_steps


def num_steps_of(devices, rows):
    mesh = abstract_mesh(MeshConfig(fsdp=devices), devices)
    found = []

    def record(x):
        found.append(contrast._make_ring(("fsdp",), *x.shape).num_steps)
        return x

    record = jax.shard_map(record, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"))
    jax.eval_shape(record, jax.ShapeDtypeStruct((devices * rows, WIDTH), "float32"))
    return found[0]


def dot_precisions(jaxpr):
    """Return the precisions of all matmuls of a traced program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.params["precision"]
        for inner in _inner_jaxprs(eqn):
            yield from dot_precisions(inner)


@pytest.mark.parametrize("loss", ["contrastive", "momentum", "negatives"])
def test_scores_are_float32_on_every_device(loss):
    visual, text, ids, weights, temperature = map(jnp.asarray, pairs(8, 0, 5))
    queue = init_queue(jax.random.key(0), 8, WIDTH)

    def run(visual, text):
        if loss == "contrastive":
            return contrastive_loss(visual, text, ids, weights, temperature)
        if loss == "momentum":
            return momentum_contrastive_loss((visual, text), (visual, text), ids, queue, temperature, 0.5)
        features = (visual, text)
        hard_negatives(features, features, ids, weights, temperature, 4, jax.random.key(0))
        return jnp.sum(visual @ text.T, where=False)  # has a gradient

    found = list(dot_precisions(jax.make_jaxpr(jax.grad(run, argnums=(0, 1)))(visual, text).jaxpr))
    own = [None, None, None] if loss == "negatives" else []
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert len(found) > 2
    assert [each for each in found if each != highest] == own


class FakeForward(ForwardPass):
    """Forward pass with given features, without a model."""

    def __init__(self, batch, features, temperature=0.07, teacher=None, alpha=0.0, queue=None):
        self.batch, self.features, self.rng = batch, features, None
        self.model = types.SimpleNamespace(contrastive=types.SimpleNamespace(temperature=jnp.asarray(temperature)))
        self.teacher, self.alpha, self.queue = teacher, alpha, queue


def test_the_objective_uses_features_ids_and_padding_and_clips_the_temperature():
    visual, text, ids, weights, _ = pairs(6, 6, 4, padded=2)
    batch = {"example_id": jnp.asarray(ids), "example_mask": jnp.asarray(weights > 0)}
    forward = FakeForward(batch, (jnp.asarray(visual), jnp.asarray(text)))
    for min_temperature, temperature in ((0.01, 0.07), (0.5, 0.5)):
        outcome = vlc_loss(forward, VlcConfig(min_temperature=min_temperature))
        assert_close(outcome.loss, reference(visual, text, ids, weights, temperature))
        assert_close(outcome.metrics["temperature"], temperature)
        assert outcome.queue is None


def test_with_a_teacher_and_a_queue_the_objective_is_the_momentum_loss():
    visual, text, ids, _, _ = pairs(4, 7, 3)
    student, teacher = (jnp.asarray(visual), jnp.asarray(text)), (jnp.asarray(text), jnp.asarray(visual[::-1]))
    batch, (visual, text, queued_ids, _, _) = {"example_id": jnp.asarray(ids, jnp.int32)}, pairs(8, 9, 3)
    queue = Queue(jnp.asarray(visual), jnp.asarray(text), jnp.asarray(queued_ids, jnp.int32), jnp.int32(0))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def grad(student, teacher):
        outcome = vlc_loss(FakeForward(batch, student, 0.07, FakeForward(batch, teacher), 0.4, queue), VlcConfig())
        return outcome.loss, outcome

    (_, to_teacher), outcome = grad(student, teacher)
    assert_close(outcome.loss, momentum_reference(student, teacher, ids, queue, 0.07, 0.4))
    np.testing.assert_array_equal(outcome.queue.visual[:4], teacher[0])
    np.testing.assert_array_equal(outcome.queue.text[:4], teacher[1])
    np.testing.assert_array_equal(outcome.queue.ids, [*ids, *queued_ids[4:]])
    np.testing.assert_array_equal(to_teacher, np.zeros((2, 4, WIDTH)))


def momentum_reference(student, teacher, ids, queue, temperature, alpha):
    """Compute mPLUG v1's formula in float64."""
    (student_visual, student_text), (teacher_visual, teacher_text) = (
        [np.asarray(x, np.float64) for x in features] for features in (student, teacher)
    )
    visuals = np.concatenate([teacher_visual, np.asarray(queue.visual, np.float64)])
    texts = np.concatenate([teacher_text, np.asarray(queue.text, np.float64)])
    hard = (ids[:, None] == np.concatenate([ids, np.asarray(queue.ids)])).astype(np.float64)
    hard /= hard.sum(1, keepdims=True)
    losses = []
    for anchors, soft, candidates in ((student_visual, teacher_visual, texts), (student_text, teacher_text, visuals)):
        target = alpha * np.exp(log_softmax(soft @ candidates.T / temperature)) + (1 - alpha) * hard
        losses.append(-(target * log_softmax(anchors @ candidates.T / temperature)).sum(1).mean())
    return sum(losses) / 2


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), num_ids=st.sampled_from([3, 10**6]), alpha=st.sampled_from([0.0, 0.4, 1.0]))
def test_the_momentum_loss_is_the_releases_formula(seed, num_ids, alpha):
    visual, text, ids, _, temperature = pairs(6, seed, num_ids)
    teacher_visual, teacher_text, queued_ids, _, _ = pairs(18, seed + 1, num_ids)
    queue = Queue(
        jnp.asarray(teacher_visual[6:]),
        jnp.asarray(teacher_text[6:]),
        jnp.asarray(queued_ids[6:], jnp.int32),
        jnp.int32(0),
    )
    teacher = (teacher_visual[:6], teacher_text[:6])
    loss = jax.jit(momentum_contrastive_loss)((visual, text), teacher, ids, queue, temperature, alpha)
    expected = momentum_reference((visual, text), teacher, ids, queue, float(temperature), alpha)
    assert_close(loss, expected, scale=1 / temperature)  # of the scores


def test_a_hand_computed_momentum_case():
    """Contrast a pair of equal vectors with an orthogonal queue of one: scores (1, 0) / 0.5 in both directions."""
    pair, queued = jnp.asarray([[1.0, 0.0]]), jnp.asarray([[0.0, 1.0]])
    queue = Queue(queued, queued, jnp.asarray([-100]), jnp.int32(0))
    features = (pair, pair)
    loss = functools.partial(momentum_contrastive_loss, features, features, jnp.asarray([3]), queue, jnp.asarray(0.5))
    p = np.exp(2) / (np.exp(2) + 1)
    assert_close(loss(0.0), -np.log(p))
    assert_close(loss(1.0), -p * np.log(p) - (1 - p) * np.log(1 - p))
    assert_close(loss(0.25), 0.75 * loss(0.0) + 0.25 * loss(1.0))


def test_the_momentum_loss_has_no_gradient_for_the_teacher():
    visual, text, ids, _, temperature = (jnp.asarray(x) for x in pairs(6, 8, 3))
    grad = jax.jit(jax.grad(momentum_contrastive_loss, argnums=(0, 1)))
    queue = Queue(text, visual, ids + 1, jnp.int32(0))
    to_student, to_teacher = grad((visual, text), (text, visual), ids, queue, temperature, 0.4)
    np.testing.assert_array_equal(to_teacher, np.zeros((2, 6, WIDTH)))
    assert np.abs(to_student).max(-1).min() > 0


def test_with_alpha_0_and_an_empty_queue_the_momentum_loss_is_the_contrastive_loss():
    visual, text, ids, weights, temperature = (jnp.asarray(x) for x in pairs(6, 5, 3))
    empty = jnp.zeros((0, WIDTH))
    queue = Queue(empty, empty, jnp.zeros(0, jnp.int32), jnp.int32(0))
    momentum = momentum_contrastive_loss((visual, text), (visual, text), ids, queue, temperature, 0.0)
    assert_close(momentum, loss_of(visual, text, ids, weights, temperature))


def test_a_queue_replaces_its_oldest_rows_and_wraps_around():
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
    larger = queue._replace(pointer=jnp.int32(4)).push(queue.visual[:3], queue.text[:3], jnp.asarray([8, 9, 10]))
    np.testing.assert_array_equal(larger.ids, [10, 7, 2, 3, 8, 9])
    assert int(larger.pointer) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_memory_per_chip_does_not_grow_with_the_number_of_chips(monkeypatch):
    """Check the ring; features of up to 16,384 pairs are gathered, which takes as many bytes as they have."""
    monkeypatch.setattr(contrast, "_MAX_GATHERED_BYTES", 0)
    memory = []
    for topology in ("v5p:2x2x2", "v5p:4x4x4", "v5p:16x16x16"):
        mesh = topology_mesh(topology, MeshConfig())
        rows, replicated = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
        batch = 32 * mesh.size

        def shape(*dims, dtype="float32", sharding=rows):
            return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

        features = shape(batch, 256)
        case = (features, features, shape(batch, dtype="int32"), shape(batch), shape(sharding=replicated))
        with jax.set_mesh(mesh):
            grad = jax.jit(jax.value_and_grad(contrastive_loss, argnums=(0, 1, 4)))
            memory.append(grad.lower(*case).compile().memory_analysis())
    for analysis in memory:
        assert analysis.temp_size_in_bytes == pytest.approx(memory[0].temp_size_in_bytes, rel=0.05)
        # Features and their gradients are sharded.
        assert analysis.argument_size_in_bytes == memory[0].argument_size_in_bytes < 2**20
        assert analysis.output_size_in_bytes == memory[0].output_size_in_bytes < 2**20
