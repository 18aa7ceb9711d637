"""Losses of the decoder, and distillation, against numpy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2_jax.objectives.config import DistillationConfig
from mplug2_jax.objectives.forward import ForwardPass, weighted_mean
from mplug2_jax.objectives.language import (
    answer_loss,
    caption_loss,
    ilm_loss,
    next_token_loss,
    summed_answer_loss,
    summed_distillation_loss,
    teacher_probabilities,
)
from tests.close import assert_close, max_magnitude

ANSWERS, LENGTH, VOCABULARY = 6, 5, 7


class FakeForward(ForwardPass):
    """Forward pass whose decoder returns given logits, without a model."""

    def __init__(self, batch, logits, teacher=None, alpha=0.0):
        self.batch, self.rng, self.teacher, self.alpha = batch, None, teacher, alpha
        self.visual = jnp.zeros((1, 1, 1))
        self.instruction_memory = (jnp.zeros((1, 1, 1)), jnp.ones((1, 1), bool))
        self.model = types.SimpleNamespace(decoder=lambda *args, rng: logits)


def log_softmax(x, axis=-1):
    x = np.asarray(x, np.float64)
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def case(seed):
    """Return logits, targets of several lengths, weights that skip first tokens, and a teacher's probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(ANSWERS, LENGTH, VOCABULARY)) * 3
    target = rng.integers(1, VOCABULARY, size=(ANSWERS, LENGTH))
    lengths = rng.integers(2, LENGTH + 1, size=(ANSWERS, 1))
    target[np.arange(LENGTH) >= lengths] = 0
    weights = ((target > 0) & (np.arange(LENGTH) >= rng.integers(0, 3, size=(ANSWERS, 1)))).astype(np.float32)
    soft = np.exp(log_softmax(rng.normal(size=(ANSWERS, LENGTH - 1, VOCABULARY)) * 2))
    return (
        jnp.asarray(x, d) for x, d in ((logits, "float32"), (target, "int32"), (weights, "float32"), (soft, "float32"))
    )


def reference_losses(logits, target):
    """Compute the cross entropy of token t + 1 under the logits at t, with loops."""
    log_probs = log_softmax(logits)
    return np.asarray([[-log_probs[a, t, target[a, t + 1]] for t in range(LENGTH - 1)] for a in range(ANSWERS)])


seeds = given(seed=st.integers(0, 2**32 - 1))
few = settings(max_examples=15)


@few
@seeds
def test_logits_at_t_predict_the_token_at_t_plus_1(seed):
    logits, target, weights, _ = case(seed)
    losses = reference_losses(logits, target)
    assert_close(jax.jit(next_token_loss)(logits, target), losses)
    sums = (losses * np.asarray(weights)[:, 1:]).sum(1)
    assert_close(jax.jit(summed_answer_loss)(logits, target, weights), sums, scale=max_magnitude(losses))


@few
@seeds
@pytest.mark.parametrize("axis", ["vocabulary", "time"])
def test_distillation_is_cross_entropy_with_a_student_normalized_over_the_given_axis(seed, axis):
    logits, _, weights, soft = case(seed)
    student = log_softmax(np.asarray(logits)[:, :-1], axis={"vocabulary": 2, "time": 1}[axis])
    expected = (-(student * np.asarray(soft, np.float64)).sum(-1) * np.asarray(weights)[:, 1:]).sum(1)
    sums = jax.jit(summed_distillation_loss, static_argnames="softmax_axis")(logits, soft, weights, softmax_axis=axis)
    assert_close(sums, expected, scale=max_magnitude(student))


def test_a_one_hot_teacher_gives_plain_cross_entropy():
    logits, target, weights, _ = case(0)
    one_hot = jax.nn.one_hot(target[:, 1:], VOCABULARY)
    assert_close(
        summed_distillation_loss(logits, one_hot, weights, softmax_axis="vocabulary"),
        summed_answer_loss(logits, target, weights),
    )


@pytest.mark.parametrize("objective", [caption_loss, ilm_loss])
def test_caption_and_ilm_losses_are_means_over_all_weighted_tokens_of_the_batch(objective):
    logits, target, weights, _ = case(1)
    mask = np.asarray([True, True, False, True, True, False])
    batch = {"target": target, "target_weights": weights, "example_mask": jnp.asarray(mask)}
    outcome = objective(FakeForward(batch, logits))
    token_weights = np.asarray(weights)[:, 1:] * mask[:, None]
    hits = np.asarray(logits)[:, :-1].argmax(-1) == np.asarray(target)[:, 1:]
    expected = (reference_losses(logits, target) * token_weights).sum() / token_weights.sum()
    assert_close(outcome.loss, expected)
    assert_close(outcome.metrics["token_accuracy"], (hits * token_weights).sum() / token_weights.sum())
    # Not the mean of means, which is a different number here.
    nonempty = token_weights.sum(1) > 0
    means = (reference_losses(logits, target) * token_weights).sum(1)[nonempty] / token_weights.sum(1)[nonempty]
    assert abs(means.mean() - expected) > 1e-2


def test_the_decoder_masks_padding_of_the_target():
    logits, target, weights, _ = case(1)
    calls = []
    forward = FakeForward({"target": target, "target_weights": weights}, logits)
    forward.model.decoder = lambda ids, mask, *memory, rng: calls.append((ids, mask)) or logits
    for objective in (caption_loss, ilm_loss, answer_loss):
        objective(forward)
    for ids, mask in calls:
        np.testing.assert_array_equal(ids, target)
        np.testing.assert_array_equal(mask, target != 0)
    assert len(calls) == 3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("questions", [6, 3, 2])
def test_answer_loss_is_weighted_token_sums_over_the_number_of_questions(questions, weighted, masked):
    logits, target, weights, _ = case(2)
    repeat = ANSWERS // questions
    batch = {"target": target, "target_weights": weights, "example_id": jnp.arange(questions)}
    answer_weights = np.ones(ANSWERS)
    counts = np.ones(questions)
    if weighted:
        answer_weights = np.asarray([0.5, 0.25, 0.0, 1.0, 0.75, 0.0])
        batch["answer_weights"] = jnp.asarray(answer_weights, jnp.float32)
    if masked:
        counts[0] = 0
        batch["example_mask"] = jnp.asarray(counts > 0)
    sums = (reference_losses(logits, target) * np.asarray(weights)[:, 1:]).sum(1)
    expected = (sums * answer_weights * counts.repeat(repeat)).sum() / counts.sum()
    # Under jit a batch's keys are sorted: the answers' weights come first.
    outcome = jax.jit(lambda batch: answer_loss(FakeForward(batch, logits)).loss)(batch)
    assert_close(outcome, expected)


def test_distillation_mixes_in_the_teachers_probabilities_by_alpha():
    logits, target, weights, _ = case(3)
    teacher_logits, *_ = case(4)
    batch = {"target": target, "target_weights": weights}
    config = DistillationConfig(softmax_axis="time")
    soft = np.exp(log_softmax(np.asarray(teacher_logits)[:, :-1]))
    assert_close(teacher_probabilities(FakeForward(batch, teacher_logits)), soft)
    without_teacher = answer_loss(FakeForward(batch, logits)).loss
    distilled = summed_distillation_loss(logits, jnp.asarray(soft, jnp.float32), weights, softmax_axis="time").mean()
    for alpha in (0.0, 0.4, 1.0):
        outcome = answer_loss(FakeForward(batch, logits, FakeForward(batch, teacher_logits), alpha), config)
        assert_close(outcome.loss, (1 - alpha) * without_teacher + alpha * distilled)
    # Without distillation a teacher (used for the contrast) has no effect.
    assert (
        answer_loss(FakeForward(batch, logits, FakeForward(batch, teacher_logits), 0.4), None).loss == without_teacher
    )


def test_only_the_student_gets_a_gradient():
    logits, target, weights, _ = case(3)
    batch = {"target": target, "target_weights": weights}

    @jax.jit
    def grads(student, teacher):
        def loss(student, teacher):
            return answer_loss(FakeForward(batch, student, FakeForward(batch, teacher), 0.4), DistillationConfig()).loss

        return jax.grad(loss, argnums=(0, 1))(student, teacher)

    to_student, to_teacher = grads(logits, logits[::-1])
    assert float(jnp.abs(to_student).max()) > 0.01
    np.testing.assert_array_equal(to_teacher, 0)


def test_a_mean_of_zero_weights_is_0_with_a_finite_gradient():
    value, grad = jax.value_and_grad(weighted_mean)(jnp.asarray([3.0, 4.0]), jnp.zeros(2))
    assert float(value) == 0
    np.testing.assert_array_equal(grad, 0)
    assert_close(weighted_mean(jnp.asarray([3.0, 4.0]), jnp.asarray([1.0, 3.0])), 3.75)
