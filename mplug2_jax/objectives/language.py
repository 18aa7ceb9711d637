"""Losses of the decoder: captions, answers, instruction following (ILM), and distillation from a teacher's decoder.

Targets are ``[CLS] words [SEP] pad``; logits at t predict the token at t + 1. ``target_weights`` is 0 for padding and
for prompt tokens without a loss.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mplug2_jax.objectives.config import DistillationConfig
from mplug2_jax.objectives.forward import ForwardPass, LossOutput, Metrics, label_cross_entropy, weighted_mean


def next_token_loss(
    logits: Float[Array, "a m v"], target: Int[Array, "a m"], smoothing: float = 0.0
) -> Float[Array, "a m1"]:
    """Compute the cross entropy of each next token, [a, m - 1]."""
    return label_cross_entropy(jax.nn.log_softmax(logits[:, :-1], axis=-1), target[:, 1:], smoothing)


def summed_answer_loss(
    logits: Float[Array, "a m v"], target: Int[Array, "a m"], weights: Float[Array, "a m"], smoothing: float = 0.0
) -> Float[Array, " a"]:
    """Sum the cross entropy over the tokens of each answer, as the release does."""
    return jnp.sum(next_token_loss(logits, target, smoothing) * weights[:, 1:], axis=-1)


def summed_distillation_loss(
    logits: Float[Array, "a m v"],
    teacher_probabilities: Float[Array, "a m1 v"],
    weights: Float[Array, "a m"],
    *,
    softmax_axis: Literal["vocabulary", "time"],
) -> Float[Array, " a"]:
    """Compute the cross entropy against a teacher's distribution, summed over the tokens of each answer.

    ``softmax_axis`` is the student's: the release normalizes over ``time`` (padding included) instead of
    ``vocabulary``.
    """
    log_probs = jax.nn.log_softmax(logits[:, :-1], axis=-1 if softmax_axis == "vocabulary" else 1)
    return jnp.sum(-jnp.sum(log_probs * teacher_probabilities, axis=-1) * weights[:, 1:], axis=-1)


def _mean_token_loss(forward: ForwardPass, memory: tuple[Array, Array], smoothing: float) -> LossOutput:
    target = forward.batch["target"]
    logits = forward.model.decoder(target, target != 0, *memory, rng=forward.key("decoder"))
    weights = forward.batch["target_weights"][:, 1:] * forward.example_weights[:, None]
    loss = weighted_mean(next_token_loss(logits, target, smoothing), weights)
    correct = (jnp.argmax(logits[:, :-1], axis=-1) == target[:, 1:]).astype(jnp.float32)
    return LossOutput(loss, {"loss": loss, "token_accuracy": weighted_mean(correct, weights)})


def caption_loss(forward: ForwardPass, smoothing: float = 0.0) -> LossOutput:
    """Compute the caption loss, weighted mean over all tokens; the memory may include an instruction."""
    return _mean_token_loss(forward, forward.caption_memory, smoothing)


def ilm_loss(forward: ForwardPass, smoothing: float = 0.0) -> LossOutput:
    """Compute the loss of the response to ``instruction``, weighted mean over all tokens."""
    return _mean_token_loss(forward, forward.instruction_memory, smoothing)


def answer_loss(
    forward: ForwardPass, distillation: DistillationConfig | None = None, smoothing: float = 0.0
) -> LossOutput:
    """Compute the release's question answering loss: weighted token sums of the answers / number of questions.

    A question may have several answers: ``target`` is [b*r, m], ``answer_weights`` is [b*r] (0 for padding; all 1 if
    absent). With a teacher the loss is (1 - alpha) * smoothed cross entropy + alpha * distillation.
    """
    batch, example_weights, teacher, alpha = forward.batch, forward.example_weights, forward.teacher, forward.alpha
    target, weights = batch["target"], batch["target_weights"]
    memory, memory_mask = forward.instruction_memory
    logits = forward.model.decoder(target, target != 0, memory, memory_mask, rng=forward.key("decoder"))
    losses = summed_answer_loss(logits, target, weights, smoothing)
    metrics: Metrics = {"cross_entropy": jnp.mean(losses)}
    if teacher is not None and distillation is not None:
        soft_targets = teacher_probabilities(teacher)
        distillation_losses = summed_distillation_loss(
            logits, soft_targets, weights, softmax_axis=distillation.softmax_axis
        )
        losses = (1.0 - alpha) * losses + alpha * distillation_losses
        metrics |= {"distillation": jnp.mean(distillation_losses)}
    question_weights = jnp.repeat(example_weights, target.shape[0] // example_weights.shape[0])
    answer_weights = batch.get("answer_weights", jnp.ones(target.shape[0])) * question_weights
    loss = jnp.sum(losses * answer_weights) / jnp.maximum(jnp.sum(example_weights), 1.0)
    return LossOutput(loss, {"loss": loss, **metrics})


def teacher_probabilities(teacher: ForwardPass) -> Float[Array, "a m1 v"]:
    """Return the teacher's distribution over the next token at each position, without gradient."""
    target = teacher.batch["target"]
    memory, memory_mask = teacher.instruction_memory
    logits = teacher.model.decoder(target, target != 0, memory, memory_mask, rng=teacher.key("decoder"))
    return jax.lax.stop_gradient(jax.nn.softmax(logits[:, :-1], axis=-1))
