"""Parity: every number of a golden folder, computed by our model from the release's weights, beside the release's own.

Each model's runner is a generator of (name, our value); what the golden files list and no runner computes is a failure,
so a folder with new arrays can never pass by being ignored.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mplug2_jax.conversion.goldens import Golden, load_goldens
from mplug2_jax.conversion.official import student_name, teacher_name, to_official
from mplug2_jax.conversion.parity_retrieval import RETRIEVAL_INPUTS, retrieval_run
from mplug2_jax.conversion.sources import HostArray
from mplug2_jax.generation.beam import SearchConfig, generate
from mplug2_jax.generation.rank import rank_answers
from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.model.mplug2 import Params
from mplug2_jax.model.taps import Taps
from mplug2_jax.objectives.forward import DeviceBatch, Forward
from mplug2_jax.objectives.language import (
    DistillationConfig,
    answer_loss,
    answer_sums,
    caption_loss,
    distillation_sums,
    teacher_probabilities,
)  # fmt: skip
from mplug2_jax.objectives.teacher import update_teacher
from mplug2_jax.training.optimizer import AdamWConfig, adamw

Named = Iterator[tuple[str, HostArray]]

ACTIVATION_TOLERANCE = 2e-5  # absolute: activations, losses, scores, probabilities
GRADIENT_TOLERANCE = 1e-4  # relative
TRAINED_TOLERANCE = 1e-3  # relative; Adam turns rounding noise into visible steps


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: largest absolute and relative difference, and whether it is within its tolerance."""

    section: str
    name: str
    shape: tuple[int, ...]
    absolute: float
    relative: float
    passed: bool
    note: str = ""


def compare(section: str, name: str, ours: HostArray, theirs: HostArray) -> Row:
    """Compares two arrays: integers exactly, floats by the largest absolute difference."""
    if ours.shape != theirs.shape:
        return Row(section, name, theirs.shape, np.inf, np.inf, False, f"ours has shape {list(ours.shape)}")
    difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    absolute = float(difference.max(initial=0.0))
    scale = float(np.abs(theirs.astype(np.float64)).max(initial=0.0))
    exact = np.issubdtype(theirs.dtype, np.integer) or theirs.dtype == bool
    passed = absolute == 0 if exact else absolute <= ACTIVATION_TOLERANCE  # NaN compares false
    return Row(section, name, theirs.shape, absolute, absolute / scale if scale else absolute, passed)


def compare_summary(section: str, name: str, ours: HostArray, theirs: dict[str, Any], tolerance: float) -> Row:
    """Compares a tensor with its recorded length, sum and first eight values, relative to its length."""
    flat = ours.astype(np.float64).reshape(-1)
    length, total, first = float(theirs["l2"]), float(theirs["sum"]), np.asarray(theirs["first8"])
    head = flat[: len(first)]
    typical = max(length / np.sqrt(flat.size), float(np.abs(first).max(initial=0.0)))
    gaps = (
        abs(float(np.linalg.norm(flat)) - length),
        abs(float(flat.sum()) - total),
        float(np.abs(head - first).max()),
    )
    relative = float(max(gaps[0] / length, gaps[1] / length, gaps[2] / typical) if length else max(gaps))
    return Row(section, name, ours.shape, gaps[2], relative, relative <= tolerance)


def run_parity(folder: Path) -> Iterator[Row]:
    """Compares every array that a golden folder lists; rows come as they are computed.

    Raises:
        UserError: the folder is missing, incomplete or damaged, or its weights do not fit its sizes.
    """
    for golden in load_goldens(folder):
        yield Row(golden.model, f"weights: {golden.account}", (), 0.0, 0.0, True)
        if golden.model == "retrieval":
            computed, gradient = retrieval_run(golden)
            yield from _against_outputs(golden, iter(computed.items()))
            yield from _gradients(golden, "grads", gradient)
            continue
        arrays = caption_arrays if golden.model == "caption" else question_arrays
        yield from _against_outputs(golden, arrays(golden))
        yield from _against_stats(golden)


def _against_outputs(golden: Golden, computed: Named) -> Iterator[Row]:
    ours = dict(computed)
    for name, theirs in golden.outputs.items():
        if name in ours:
            yield compare(golden.model, name, np.asarray(ours[name]), theirs)
        elif name not in RETRIEVAL_INPUTS:
            yield Row(golden.model, name, theirs.shape, np.inf, np.inf, False, "not computed")


# --- inputs -----------------------------------------------------------------------------------------------------------


def _frames(golden: Golden) -> jax.Array:
    return jnp.asarray(golden.inputs["image"].transpose(0, 2, 3, 4, 1))  # [b, 3, t, y, x] -> [b, t, y, x, 3]


def _caption_batch(golden: Golden, *, masked_prompt: bool = True) -> DeviceBatch:
    ids, mask = golden.inputs["caption_ids"], golden.inputs["caption_mask"].astype(bool)
    prompt = golden.settings["prompt_mask_length"] if masked_prompt else 0
    weights = (mask & (np.arange(ids.shape[1]) >= prompt)).astype(np.float32)
    return {"frames": _frames(golden), "target": jnp.asarray(ids, jnp.int32), "target_weights": jnp.asarray(weights)}


def _slots_of_answers(golden: Golden) -> HostArray:
    """Row of each answer when every question is padded to the same number r of answers."""
    counts = golden.inputs["answer_k"]
    return np.concatenate([i * counts.max() + np.arange(k) for i, k in enumerate(counts)])


def _question_batch(golden: Golden) -> DeviceBatch:
    x, rows = golden.inputs, _slots_of_answers(golden)
    total = len(x["answer_k"]) * int(x["answer_k"].max())

    def spread(values: HostArray, fill: HostArray) -> jax.Array:
        out = np.broadcast_to(fill, (total, *values.shape[1:])).copy()
        out[rows] = values
        return jnp.asarray(out)

    ids = x["answer_ids"].astype(np.int32)
    return {
        "frames": _frames(golden),
        "instruction": jnp.asarray(x["question_ids"], jnp.int32),
        "instruction_mask": jnp.asarray(x["question_mask"].astype(bool)),
        "target": spread(ids, ids[0]),  # a padding answer repeats a real one and weighs nothing
        "target_weights": spread(x["answer_mask"].astype(np.float32), np.zeros((), np.float32)),
        "answer_weights": spread(x["answer_weights"].astype(np.float32), np.zeros((), np.float32)),
    }


# --- arrays -----------------------------------------------------------------------------------------------------------


def _visual_arrays(taps: Mapping[str, jax.Array], golden: Golden) -> Named:
    yield "vision_ln_pre", np.asarray(taps["vision/norm_pre"])
    for i, block in enumerate(taps["vision/block"]):
        yield f"vision_block{i}", np.asarray(block).transpose(1, 0, 2)
    yield "vision_out", np.asarray(taps["vision/out"])
    yield "visn_embeds_pre", np.asarray(taps["visual/in"])
    depth = golden.definition.config.universal_layers
    for i in range(depth):
        yield f"uni_layer{i}", np.asarray(taps[f"universal/visual{i}"])
    yield "uni_out", np.asarray(taps[f"universal/visual{depth - 1}"])
    yield "visn_embeds_post", np.asarray(taps["visual/out"])


def _decoder_arrays(taps: Mapping[str, jax.Array], logits: jax.Array, rows: HostArray) -> Named:
    yield "dec_embed", np.asarray(taps["decoder/embed"])[rows]
    for i, layer in enumerate(taps["decoder/layer"]):
        yield f"dec_layer{i}", np.asarray(layer)[rows]
    yield "dec_logits", np.asarray(logits)[rows]


def _searches(golden: Golden, memory: jax.Array, mask: jax.Array) -> Named:
    """Beam searches of every width that the outputs list."""
    settings = golden.settings
    limits = settings[f"{golden.model}_generation"]
    tokens = SpecialTokens(begin=settings["bos"], end=settings["eos"])
    for width in sorted({int(m[1]) for m in map(re.compile(r"beam(\d+)_ids").fullmatch, golden.outputs) if m}):
        config = SearchConfig(beams=width, extend_finished=True, **limits)

        @jax.jit
        def search(params: Params, memory: jax.Array, mask: jax.Array, config: SearchConfig = config) -> Any:
            return generate(golden.definition.bind(params).decoder, memory, mask, config, tokens)

        found = jax.tree.map(np.asarray, search(golden.params, memory, mask))
        longest = golden.outputs[f"beam{width}_ids"].shape[-1]
        ended = np.arange(found.ids.shape[-1]) >= found.lengths[..., None]
        yield f"beam{width}_ids", np.where(ended, -1, found.ids)[..., :longest].astype(np.int64)
        yield f"beam{width}_scores", found.scores


def caption_arrays(golden: Golden) -> Named:
    """Everything the caption model's outputs list."""
    batch, unmasked = _caption_batch(golden), _caption_batch(golden, masked_prompt=False)

    @jax.jit
    def run(params: Params) -> Any:
        model, taps = golden.definition.bind(params), Taps()
        visual = model.visual_tokens(batch["frames"], taps=taps)
        logits = model.decoder(batch["target"], batch["target"] != 0, visual, taps=taps)
        return (
            dict(taps),
            visual,
            logits,
            caption_loss(Forward(model, batch)).loss,
            caption_loss(Forward(model, unmasked)).loss,
        )

    taps, visual, logits, loss, loss_unmasked = run(golden.params)
    yield from _visual_arrays(taps, golden)
    yield from _decoder_arrays(taps, logits, np.arange(logits.shape[0]))
    yield "caption_loss", np.asarray(loss)
    yield "caption_loss_no_prompt_mask", np.asarray(loss_unmasked)
    yield from _searches(golden, visual, jnp.ones(visual.shape[:2], bool))


def _fusion_arrays(taps: Mapping[str, jax.Array], golden: Golden) -> Named:
    stacked: list[jax.Array] = []
    for j in range(golden.definition.config.fusion_layers):
        if f"fusion/layer{j}" in taps:
            stacked.append(taps[f"fusion/layer{j}"])
        elif f"fusion/layers_from{j}" in taps:
            stacked.extend(taps[f"fusion/layers_from{j}"])
    for j, layer in enumerate(stacked):
        yield f"fusion_layer{golden.fusion_start + j}", np.asarray(layer)


def question_arrays(golden: Golden) -> Named:
    """Everything the question-answering model's outputs list."""
    batch, rows = _question_batch(golden), _slots_of_answers(golden)
    ids, mask = batch["instruction"], batch["instruction_mask"]

    @jax.jit
    def run(params: Params) -> Any:
        model, taps = golden.definition.bind(params), Taps()
        visual = model.visual_tokens(batch["frames"], taps=taps)
        text = model.text_tokens(ids, mask, taps=taps)
        image, fused = model.fusion(text, mask, visual, taps=taps)
        memory, memory_mask = Forward(model, batch).instructed
        logits = model.decoder(batch["target"], batch["target"] != 0, memory, memory_mask, taps=taps)
        sums = answer_sums(logits, batch["target"], batch["target_weights"])
        loss = answer_loss(Forward(model, batch)).loss
        return dict(taps), text, visual, image, fused, memory, memory_mask, logits, sums, loss

    taps, text, visual, image, fused, memory, memory_mask, logits, sums, loss = run(golden.params)
    yield from _visual_arrays(taps, golden)
    yield "text_embed", np.asarray(taps["text/embed"])
    layers = [*taps.get("text/layer", ()), *taps["universal/text"]]
    yield from ((f"text_layer{i}", np.asarray(layer)) for i, layer in enumerate(layers))
    yield "text_out", np.asarray(text)
    yield from _fusion_arrays(taps, golden)
    yield "fusion_image", np.asarray(image)
    yield "fusion_text", np.asarray(fused)
    for stride in sorted(
        {int(m[1]) for m in map(re.compile(r"fusion_stride(\d+)_text").fullmatch, golden.outputs) if m}
    ):
        definition, params = golden.fusion_with_stride(stride)
        mixed = jax.jit(lambda p, *x, d=definition: d.bind(p).fusion(*x))(params, text, mask, visual)
        yield f"fusion_stride{stride}_image", np.asarray(mixed[0])
        yield f"fusion_stride{stride}_text", np.asarray(mixed[1])
    yield "dec_memory", np.asarray(memory)
    yield "dec_memory_mask", np.asarray(memory_mask).astype(golden.outputs["dec_memory_mask"].dtype)
    yield from _decoder_arrays(taps, logits, rows)
    yield "vqa_loss", np.asarray(loss)
    yield "vqa_loss_per_answer", np.asarray(sums)[rows]
    if golden.teacher is not None:
        yield from _distillation_arrays(golden, batch, rows)
    yield from _searches(golden, memory, memory_mask)

    candidates, candidates_mask = golden.inputs["cand_ids"], golden.inputs["cand_mask"].astype(bool)
    ranked = jax.jit(
        lambda p, m, n: rank_answers(
            golden.definition.bind(p).decoder, m, n, jnp.asarray(candidates, jnp.int32), jnp.asarray(candidates_mask),
            keep=golden.settings["rank_k"], first_twice=True,
        )
    )(golden.params, memory, memory_mask)  # fmt: skip
    yield "rank_ids", np.asarray(ranked[0]).astype(np.int64)
    yield "rank_probs", np.asarray(ranked[1])


def released_distillation(golden: Golden, *, alpha: float) -> DistillationConfig:
    """The release's form, which normalises over time and leaves the fusion teacher alone."""
    return DistillationConfig(alpha=alpha, momentum=golden.settings["momentum"], over="time", fusion=False)


def _distilled_loss(golden: Golden, batch: DeviceBatch, alpha: float) -> Callable[[Params, Params], jax.Array]:
    config = released_distillation(golden, alpha=alpha)

    def loss(params: Params, teacher: Params) -> jax.Array:
        taught = Forward(golden.definition.bind(teacher), batch)
        own = Forward(golden.definition.bind(params), batch, teacher=taught, alpha=config.alpha)
        return answer_loss(own, config).loss

    return loss


def _distillation_arrays(golden: Golden, batch: DeviceBatch, rows: HostArray) -> Named:
    assert golden.teacher is not None
    alpha = golden.settings["alpha"]
    config = released_distillation(golden, alpha=alpha)
    teacher = update_teacher(golden.teacher, golden.params, config.momentum, frozen=config.frozen)
    # The release asks for alpha but drops it on the way to the decoder: its distillation is alpha = 0.
    yield "vqa_loss_release_distill", np.asarray(jax.jit(_distilled_loss(golden, batch, 0.0))(golden.params, teacher))
    yield (
        f"vqa_loss_distill_alpha{alpha}",
        np.asarray(jax.jit(_distilled_loss(golden, batch, alpha))(golden.params, teacher)),
    )

    @jax.jit
    def run(params: Params, teacher: Params) -> Any:
        target, weights = batch["target"], batch["target_weights"]
        logits = []
        for tree in (params, teacher):
            model = golden.definition.bind(tree)
            logits.append(model.decoder(target, target != 0, *Forward(model, batch).instructed))
        soft = teacher_probabilities(Forward(golden.definition.bind(teacher), batch))
        sums = (1 - alpha) * answer_sums(logits[0], target, weights)
        sums += alpha * distillation_sums(logits[0], soft, weights, over=config.over)
        return sums, logits[1][:, :-1], soft

    sums, teacher_logits, soft = run(golden.params, teacher)
    yield f"vqa_loss_distill_alpha{alpha}_per_answer", np.asarray(sums)[rows]
    yield "teacher_logits", np.asarray(teacher_logits)[rows]
    yield "teacher_probs", np.asarray(soft)[rows]


# --- gradients and training -------------------------------------------------------------------------------------------


def _against_stats(golden: Golden) -> Iterator[Row]:
    stats, params = golden.stats, golden.params
    batch = _caption_batch(golden) if golden.model == "caption" else _question_batch(golden)
    objective = caption_loss if golden.model == "caption" else answer_loss

    def plain(params: Params) -> jax.Array:
        return objective(Forward(golden.definition.bind(params), batch)).loss

    yield from _gradients(golden, "grads", jax.jit(jax.grad(plain))(params))
    if golden.teacher is not None:
        alpha = golden.settings["alpha"]
        config = released_distillation(golden, alpha=alpha)
        teacher = update_teacher(golden.teacher, params, config.momentum, frozen=config.frozen)
        distilled = jax.jit(jax.grad(_distilled_loss(golden, batch, alpha)))(params, teacher)
        yield from _gradients(golden, f"grads_distill_alpha{alpha}", distilled)
        recorded = stats["teacher_after_1_update"]
        for name, ours in to_official(teacher, golden.slots, golden.source):
            section = f"{golden.model}.teacher_after_1_update"
            yield compare_summary(section, teacher_name(name), ours, recorded[teacher_name(name)], GRADIENT_TOLERANCE)
    yield from _training(golden, plain)
    known = {"grads", "train"}
    if golden.teacher is not None:
        known |= {f"grads_distill_alpha{golden.settings['alpha']}", "teacher_after_1_update"}
    for kind in sorted(set(stats) - known):
        yield Row(golden.model, kind, (), np.inf, np.inf, False, "not computed")


def _gradients(golden: Golden, kind: str, gradients: Params) -> Iterator[Row]:
    recorded, section = golden.stats[kind], f"{golden.model}.{kind}"
    ours = dict(to_official(gradients, golden.slots, golden.source))
    reached = {name for name, value in recorded.items() if value is not None}
    differing = sorted(reached ^ set(ours))
    yield Row(
        section, "which parameters get a gradient", (len(reached),), float(len(differing)), 0.0, not differing,
        f"differ: {', '.join(differing[:4])}" if differing else "",
    )  # fmt: skip
    for name in sorted(reached & set(ours)):
        if not name.endswith(".key.bias"):  # zero in exact arithmetic
            yield compare_summary(section, name, ours[name], recorded[name], GRADIENT_TOLERANCE)


def _training(golden: Golden, loss: Callable[[Params], jax.Array]) -> Iterator[Row]:
    """Three AdamW steps with the release's groups; the teacher, where there is one, moves before every loss."""
    recorded, train = golden.stats["train"], golden.settings["train"]
    config = AdamWConfig(
        weight_decay=train["weight_decay"], b1=train["betas"][0], b2=train["betas"][1], eps=train["eps"],
        decay="released", clip_norm=0.0,
    )  # fmt: skip
    optimizer = adamw(config, train["lr_other"], train["lr_visual"])
    frozen = released_distillation(golden, alpha=0.0).frozen

    @jax.jit
    def step(params: Params, state: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return value, optax.apply_updates(params, updates), state

    params, teacher, losses = golden.params, golden.teacher, []
    state = optimizer.init(params)
    for i in range(train["steps"] + 1):
        if teacher is not None:
            teacher = update_teacher(teacher, params, golden.settings["momentum"], frozen=frozen)
        if i < train["steps"]:
            value, params, state = step(params, state)
        else:
            value = jax.jit(loss)(params)
        losses.append(float(value))
    section = f"{golden.model}.train"
    yield compare(section, "losses", np.asarray(losses), np.asarray(recorded["losses"]))
    after = dict(to_official(params, golden.slots, golden.source))
    if teacher is not None:
        after |= {teacher_name(n): v for n, v in to_official(teacher, golden.slots, golden.source)}
    for name, theirs in recorded["params_after"].items():
        if name in after and not name.endswith((".key.bias", ".in_proj_bias")):
            yield compare_summary(section, name, after[name], theirs, TRAINED_TOLERANCE)
        elif name not in after and name == student_name(name):
            # What we call dead must not have moved: its weights after training are those of the file.
            yield compare_summary(section, name, golden.source.read(name), theirs, 1e-6)
