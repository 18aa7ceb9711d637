"""Losses on decoded text: captions, answers and instructed answers, and distillation from a teacher's decoder.

Targets are ``[CLS] words [SEP] pad``; logits at t predict the token at t + 1. ``target_weights`` say which tokens
count as predictions: 0 for padding and for whatever of a prompt is not to be learned.
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
    """Cross entropy of each following token, [a, m - 1]."""
    return label_cross_entropy(jax.nn.log_softmax(logits[:, :-1], axis=-1), target[:, 1:], smoothing)


def summed_answer_loss(
    logits: Float[Array, "a m v"], target: Int[Array, "a m"], weights: Float[Array, "a m"], smoothing: float = 0.0
) -> Float[Array, " a"]:
    """The release's loss of an answer: the sum over its tokens."""
    return jnp.sum(next_token_loss(logits, target, smoothing) * weights[:, 1:], axis=-1)


def summed_distillation_loss(
    logits: Float[Array, "a m v"],
    teacher_probabilities: Float[Array, "a m1 v"],
    weights: Float[Array, "a m"],
    *,
    softmax_axis: Literal["vocabulary", "time"],
) -> Float[Array, " a"]:
    """Cross entropy against a teacher's distribution at each position, summed over an answer's tokens.

    The release normalises the student over the wrong axis, ``time`` (padding included); ``vocabulary`` is what was
    meant.
    """
    log_probs = jax.nn.log_softmax(logits[:, :-1], axis=-1 if softmax_axis == "vocabulary" else 1)
    return jnp.sum(-jnp.sum(log_probs * teacher_probabilities, axis=-1) * weights[:, 1:], axis=-1)


def _token_mean(logits: Array, target: Array, weights: Array, counts: Array, smoothing: float) -> LossOutput:
    weights = weights[:, 1:] * counts[:, None]
    loss = weighted_mean(next_token_loss(logits, target, smoothing), weights)
    hit = (jnp.argmax(logits[:, :-1], axis=-1) == target[:, 1:]).astype(jnp.float32)
    return LossOutput(loss, {"loss": loss, "token_accuracy": weighted_mean(hit, weights)})


def caption_loss(forward: ForwardPass, smoothing: float = 0.0) -> LossOutput:
    """Caption, from the picture alone as in the release or as instructed: mean over the batch's counted tokens."""
    batch = forward.batch
    mask = batch["target"] != 0
    logits = forward.model.decoder(batch["target"], mask, *forward.caption_memory, rng=forward.key("decoder"))
    return _token_mean(logits, batch["target"], batch["target_weights"], forward.example_weights, smoothing)


def ilm_loss(forward: ForwardPass, smoothing: float = 0.0) -> LossOutput:
    """Instruction-based generation: the answer to ``instruction``, mean over all counted tokens of the batch."""
    batch = forward.batch
    memory, memory_mask = forward.instruction_memory
    mask = batch["target"] != 0
    logits = forward.model.decoder(batch["target"], mask, memory, memory_mask, rng=forward.key("decoder"))
    return _token_mean(logits, batch["target"], batch["target_weights"], forward.example_weights, smoothing)


def answer_loss(
    forward: ForwardPass, distillation: DistillationConfig | None = None, smoothing: float = 0.0
) -> LossOutput:
    """The release's question answering: token sums per answer, weighted, over the number of questions.

    A question may have several answers: ``target`` is [b*r, m], ``answer_weights`` [b*r] (0 for padding, 1 if absent).
    With a teacher the loss is (1 - alpha) * cross entropy, smoothed, + alpha * distillation, which is not.
    """
    batch, counts, teacher, alpha = forward.batch, forward.example_weights, forward.teacher, forward.alpha
    target, weights = batch["target"], batch["target_weights"]
    memory, memory_mask = forward.instruction_memory
    logits = forward.model.decoder(target, target != 0, memory, memory_mask, rng=forward.key("decoder"))
    sums = summed_answer_loss(logits, target, weights, smoothing)
    metrics: Metrics = {"cross_entropy": jnp.mean(sums)}
    if teacher is not None and distillation is not None:
        soft = teacher_probabilities(teacher)
        distilled = summed_distillation_loss(logits, soft, weights, softmax_axis=distillation.softmax_axis)
        sums = (1.0 - alpha) * sums + alpha * distilled
        metrics |= {"distillation": jnp.mean(distilled)}
    per_question = jnp.repeat(counts, target.shape[0] // counts.shape[0])
    answer_weights = batch.get("answer_weights", jnp.ones(target.shape[0])) * per_question
    loss = jnp.sum(sums * answer_weights) / jnp.maximum(jnp.sum(counts), 1.0)
    return LossOutput(loss, {"loss": loss, **metrics})


def teacher_probabilities(teacher: ForwardPass) -> Float[Array, "a m1 v"]:
    """What the teacher expects at each position, without gradient."""
    target = teacher.batch["target"]
    memory, memory_mask = teacher.instruction_memory
    logits = teacher.model.decoder(target, target != 0, memory, memory_mask, rng=teacher.key("decoder"))
    return jax.lax.stop_gradient(jax.nn.softmax(logits[:, :-1], axis=-1))
