"""Compute the arrays of a retrieval golden: mPLUG v1's contrastive loss with teacher and queue, and matching."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug2_jax.conversion.files.sources import HostArray
from mplug2_jax.conversion.parity.goldens import Golden
from mplug2_jax.model.mplug2 import Params, define_model
from mplug2_jax.objectives.config import VlcConfig, VlmConfig
from mplug2_jax.objectives.ema import ema_update
from mplug2_jax.objectives.forward import ForwardPass
from mplug2_jax.objectives.queue import Queue
from mplug2_jax.objectives.vlc import vlc_loss
from mplug2_jax.objectives.vlm import hard_negatives, vlm_loss

RETRIEVAL_INPUTS = ("image", "text_ids", "text_mask", "idx", "alpha")
TEACHER_PARTS = ("vision", "text", "contrastive")


def compute_retrieval(golden: Golden) -> tuple[dict[str, HostArray], Params]:
    """Compute every array of the golden's data file but its inputs, and the gradients of the total loss."""
    x = golden.inputs
    assert golden.teacher is not None
    batch = {
        "frames": jnp.asarray(x["image"].transpose(0, 2, 3, 1)[:, None]),
        "text": jnp.asarray(x["text_ids"], jnp.int32),
        "text_mask": jnp.asarray(x["text_mask"].astype(bool)),
        "example_id": jnp.asarray(x["idx"].reshape(-1), jnp.int32),
    }
    queue = Queue(
        jnp.asarray(golden.source.read("image_queue").T),
        jnp.asarray(golden.source.read("text_queue").T),
        jnp.asarray(golden.source.read("idx_queue").reshape(-1), jnp.int32),
        jnp.asarray(golden.source.read("queue_ptr").reshape(()), jnp.int32),
    )
    student_params = {part: golden.params[part] for part in golden.teacher}
    teacher_params = ema_update(golden.teacher, student_params, golden.settings["momentum"])
    teacher_definition = define_model(golden.model_def.config, TEACHER_PARTS)

    def loss(params: Params) -> Any:
        teacher = ForwardPass(teacher_definition.bind(teacher_params), batch)
        student = ForwardPass(
            golden.model_def.bind(params), batch, teacher=teacher, alpha=float(x["alpha"]), queue=queue
        )
        contrast = vlc_loss(student, VlcConfig(min_temperature=0.0))
        matching = vlm_loss(student, VlmConfig(group_size=0)).loss
        temperature = student.model.contrastive.temperature[...]
        ids, weights = batch["example_id"], student.example_weights
        negatives = hard_negatives(student.features, teacher.features, ids, weights, temperature, len(ids), None)
        losses = contrast.loss, matching
        return contrast.loss + matching, (student.features, teacher.features, losses, negatives, contrast.queue)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, (features, teacher_features, losses, negatives, queue_after)), gradients = run(golden.params)
    arrays = {
        "image_feat": features[0], "text_feat": features[1],
        "image_feat_m": teacher_features[0], "text_feat_m": teacher_features[1],
        "loss_itc": losses[0], "loss_itm": losses[1],
        "neg_image_per_text": negatives[0][0], "neg_text_per_image": negatives[1][0],
        "image_queue_after": queue_after.visual.T, "text_queue_after": queue_after.text.T,
        "idx_queue_after": queue_after.ids[None], "queue_ptr_after": queue_after.pointer[None],
    }  # fmt: skip
    return {name: np.asarray(value) for name, value in arrays.items()}, gradients
