"""The arrays of a retrieval golden: mPLUG v1's contrast with teacher and queue, and its matching."""

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


def retrieval_run(golden: Golden) -> tuple[dict[str, HostArray], Params]:
    """Every array that the golden's data file lists beside its inputs, and the gradient of the whole loss."""
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
    student_part = {part: golden.params[part] for part in golden.teacher}
    teacher = ema_update(golden.teacher, student_part, golden.settings["momentum"])
    teaching = define_model(golden.definition.config, TEACHER_PARTS)

    def loss(params: Params) -> Any:
        taught = ForwardPass(teaching.bind(teacher), batch)
        own = ForwardPass(golden.definition.bind(params), batch, teacher=taught, alpha=float(x["alpha"]), queue=queue)
        contrast = vlc_loss(own, VlcConfig(min_temperature=0.0))
        matching = vlm_loss(own, VlmConfig(group_size=0)).loss
        temperature = own.model.contrastive.temperature[...]
        ids, counts = batch["example_id"], own.example_weights
        negatives = hard_negatives(own.features, taught.features, ids, counts, temperature, len(ids), None)
        aside = (
            own.features,
            taught.features,
            contrast.loss,
            matching,
            negatives[0][0],
            negatives[1][0],
            contrast.queue,
        )
        return contrast.loss + matching, aside

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, (own, theirs, contrast, matching, picture, text, after)), gradient = run(golden.params)
    arrays = {
        "image_feat": own[0], "text_feat": own[1], "image_feat_m": theirs[0], "text_feat_m": theirs[1],
        "loss_itc": contrast, "loss_itm": matching, "neg_image_per_text": picture, "neg_text_per_image": text,
        "image_queue_after": after.visual.T, "text_queue_after": after.text.T, "idx_queue_after": after.ids[None],
        "queue_ptr_after": after.pointer[None],
    }  # fmt: skip
    return {name: np.asarray(value) for name, value in arrays.items()}, gradient
