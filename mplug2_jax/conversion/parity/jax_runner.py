"""Parity: compute every number of a golden folder from the release's weights, and compare it with the release's.

This module computes our model's numbers, ``torch_runner`` the PyTorch runtime's; ``comparison`` compares them.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mplug2_jax.conversion.files.sources import HostArray
from mplug2_jax.conversion.layouts.official import to_official
from mplug2_jax.conversion.parity.comparison import (
    NamedArrays,
    Row,
    Runner,
    compare_all,
    compare_gradients,
    compare_outputs,
    find_numbers,
    make_caption_weights,
    make_weights_row,
    name_beam_arrays,
    name_intermediates,
    with_teacher_names,
)  # fmt: skip
from mplug2_jax.conversion.parity.goldens import Golden, load_goldens
from mplug2_jax.conversion.parity.retrieval import RETRIEVAL_INPUTS, compute_retrieval
from mplug2_jax.errors import UserError
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.generation.decode import generate
from mplug2_jax.generation.rank import rank_answers
from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.model.mplug2 import Params
from mplug2_jax.model.taps import Taps
from mplug2_jax.objectives.config import DistillationConfig
from mplug2_jax.objectives.ema import ema_update
from mplug2_jax.objectives.forward import DeviceBatch, ForwardPass
from mplug2_jax.objectives.language import (
    answer_loss,
    caption_loss,
    summed_answer_loss,
    summed_distillation_loss,
    teacher_probabilities,
)
from mplug2_jax.training.config import OptimizerConfig
from mplug2_jax.training.optim.optimizer import make_optimizer

Framework = Literal["jax", "torch"]
RETRIEVAL_NOTE = "the PyTorch runtime has no retrieval model, so these rows are jax's"


def run_parity(folder: Path, framework: Framework = "jax") -> Iterator[Row]:
    """Compare every array in a golden folder; yields rows as they are computed.

    Raises:
        UserError: the folder is missing, incomplete or damaged, its weights do not fit its sizes, or the framework is
            not installed.
    """
    make_runner = JaxRunner if framework == "jax" else _import_torch_runner()
    with jax.default_matmul_precision("highest"):  # or TPUs and GPUs would round float32 operands
        for golden in load_goldens(folder):
            if golden.model == "retrieval":
                yield from _compare_retrieval(golden, "" if framework == "jax" else RETRIEVAL_NOTE)
            else:
                yield from compare_all(golden, make_runner(golden))


def _import_torch_runner() -> Callable[[Golden], Runner]:
    try:
        from mplug2_jax.conversion.parity.torch_runner import TorchRunner
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UserError("--framework torch needs PyTorch: pip install 'mplug2-jax[torch]'") from error
    return TorchRunner


def _compare_retrieval(golden: Golden, note: str) -> Iterator[Row]:
    yield make_weights_row(golden, golden.load_summary, note)
    arrays, gradients = compute_retrieval(golden)
    yield from compare_outputs(golden, iter(arrays.items()), RETRIEVAL_INPUTS)
    yield from compare_gradients(golden, "grads", _to_official(golden, gradients))


def _to_official(golden: Golden, tree: Params) -> dict[str, HostArray]:
    return dict(to_official(tree, golden.mappings, golden.source))


# --- inputs -----------------------------------------------------------------------------------------------------------


def _frames(golden: Golden) -> jax.Array:
    return jnp.asarray(golden.inputs["image"].transpose(0, 2, 3, 4, 1))  # [b, 3, t, y, x] -> [b, t, y, x, 3]


def _caption_batch(golden: Golden, *, masked_prompt: bool = True) -> DeviceBatch:
    weights = make_caption_weights(golden, masked_prompt=masked_prompt)
    ids = jnp.asarray(golden.inputs["caption_ids"], jnp.int32)
    return {"frames": _frames(golden), "target": ids, "target_weights": jnp.asarray(weights)}


def _find_answer_rows(golden: Golden) -> HostArray:
    """Return the row of each answer when every question is padded to the same number r of answers."""
    counts = golden.inputs["answer_k"]
    return np.concatenate([i * counts.max() + np.arange(k) for i, k in enumerate(counts)])


def _question_batch(golden: Golden) -> DeviceBatch:
    x, rows = golden.inputs, _find_answer_rows(golden)
    total = len(x["answer_k"]) * int(x["answer_k"].max())

    def pad_answers(values: HostArray, fill: HostArray) -> jax.Array:
        out = np.broadcast_to(fill, (total, *values.shape[1:])).copy()
        out[rows] = values
        return jnp.asarray(out)

    ids = x["answer_ids"].astype(np.int32)
    return {
        "frames": _frames(golden),
        "instruction": jnp.asarray(x["question_ids"], jnp.int32),
        "instruction_mask": jnp.asarray(x["question_mask"].astype(bool)),
        "target": pad_answers(ids, ids[0]),  # padding repeats a real answer with weight 0
        "target_weights": pad_answers(x["answer_mask"].astype(np.float32), np.zeros((), np.float32)),
        "answer_weights": pad_answers(x["answer_weights"].astype(np.float32), np.zeros((), np.float32)),
    }


# --- arrays -----------------------------------------------------------------------------------------------------------


def _run_searches(golden: Golden, memory: jax.Array, mask: jax.Array) -> NamedArrays:
    """Run beam searches with every width in the outputs."""
    settings = golden.settings
    limits = settings[f"{golden.model}_generation"]
    tokens = SpecialTokens(begin=settings["bos"], end=settings["eos"])
    for width in find_numbers(golden, r"beam(\d+)_ids"):
        config = SearchConfig(num_beams=width, extend_finished=True, **limits)

        @jax.jit
        def search(params: Params, memory: jax.Array, mask: jax.Array, config: SearchConfig = config) -> Any:
            return generate(golden.model_def.bind(params).decoder, memory, mask, config, tokens)

        output = jax.tree.map(np.asarray, search(golden.params, memory, mask))
        yield from name_beam_arrays(golden, width, output.ids, output.lengths, output.scores)


def compute_caption(golden: Golden) -> NamedArrays:
    """Compute every array in the caption model's outputs."""
    batch, unmasked = _caption_batch(golden), _caption_batch(golden, masked_prompt=False)

    @jax.jit
    def run(params: Params) -> Any:
        model, taps = golden.model_def.bind(params), Taps()
        visual = model.encode_visual(batch["frames"], taps=taps)
        logits = model.decoder(batch["target"], batch["target"] != 0, visual, taps=taps)
        losses = [caption_loss(ForwardPass(model, x)).loss for x in (batch, unmasked)]
        return dict(taps), visual, logits, losses

    taps, visual, logits, (loss, loss_unmasked) = run(golden.params)
    yield from name_intermediates(taps, golden, logits)
    yield "caption_loss", np.asarray(loss)
    yield "caption_loss_no_prompt_mask", np.asarray(loss_unmasked)
    yield from _run_searches(golden, visual, jnp.ones(visual.shape[:2], bool))


def compute_videoqa(golden: Golden) -> NamedArrays:
    """Compute every array in the question-answering model's outputs."""
    batch, rows = _question_batch(golden), _find_answer_rows(golden)
    ids, mask = batch["instruction"], batch["instruction_mask"]

    @jax.jit
    def run(params: Params) -> Any:
        model, taps = golden.model_def.bind(params), Taps()
        visual = model.encode_visual(batch["frames"], taps=taps)
        text = model.encode_text(ids, mask, taps=taps)
        image, fused = model.fusion(text, mask, visual, taps=taps)
        memory, memory_mask = ForwardPass(model, batch).instruction_memory
        logits = model.decoder(batch["target"], batch["target"] != 0, memory, memory_mask, taps=taps)
        sums = summed_answer_loss(logits, batch["target"], batch["target_weights"])
        loss = answer_loss(ForwardPass(model, batch)).loss
        return dict(taps), text, visual, image, fused, memory, memory_mask, logits, sums, loss

    taps, text, visual, image, fused, memory, memory_mask, logits, sums, loss = run(golden.params)
    yield from name_intermediates(taps, golden, logits, rows, (image, fused))
    for stride in find_numbers(golden, r"fusion_stride(\d+)_text"):
        model_def, params = golden.fusion_with_stride(stride)
        mixed = jax.jit(lambda p, *x, d=model_def: d.bind(p).fusion(*x))(params, text, mask, visual)
        yield f"fusion_stride{stride}_image", np.asarray(mixed[0])
        yield f"fusion_stride{stride}_text", np.asarray(mixed[1])
    yield "dec_memory", np.asarray(memory)
    yield "dec_memory_mask", np.asarray(memory_mask).astype(golden.outputs["dec_memory_mask"].dtype)
    yield "vqa_loss", np.asarray(loss)
    yield "vqa_loss_per_answer", np.asarray(sums)[rows]
    if golden.teacher is not None:
        yield from _compute_distillation(golden, batch, rows)
    yield from _run_searches(golden, memory, memory_mask)

    candidates, candidates_mask = golden.inputs["cand_ids"], golden.inputs["cand_mask"].astype(bool)
    ranked = jax.jit(
        lambda p, m, n: rank_answers(
            golden.model_def.bind(p).decoder, m, n, jnp.asarray(candidates, jnp.int32), jnp.asarray(candidates_mask),
            num_candidates=golden.settings["rank_k"], double_count_first_token=True,
        )
    )(golden.params, memory, memory_mask)  # fmt: skip
    yield "rank_ids", np.asarray(ranked[0]).astype(np.int64)
    yield "rank_probs", np.asarray(ranked[1])


def released_distillation(golden: Golden, *, alpha: float) -> DistillationConfig:
    """Return distillation as in the release, which normalizes over time and never updates the fusion teacher."""
    return DistillationConfig(
        alpha=alpha, momentum=golden.settings["momentum"], softmax_axis="time", average_fusion=False
    )


def _distilled_loss(golden: Golden, batch: DeviceBatch, alpha: float) -> Callable[[Params, Params], jax.Array]:
    config = released_distillation(golden, alpha=alpha)

    def loss(params: Params, teacher: Params) -> jax.Array:
        teacher_pass = ForwardPass(golden.model_def.bind(teacher), batch)
        student = ForwardPass(golden.model_def.bind(params), batch, teacher=teacher_pass, alpha=config.alpha)
        return answer_loss(student, config).loss

    return loss


def _compute_distillation(golden: Golden, batch: DeviceBatch, rows: HostArray) -> NamedArrays:
    alpha = golden.settings["alpha"]
    config, teacher = released_distillation(golden, alpha=alpha), _updated_teacher(golden)
    # The release has an alpha but drops it on the way to the decoder: its distillation has alpha = 0.
    for name, weight in (("vqa_loss_release_distill", 0.0), (f"vqa_loss_distill_alpha{alpha}", alpha)):
        yield name, np.asarray(jax.jit(_distilled_loss(golden, batch, weight))(golden.params, teacher))

    @jax.jit
    def run(params: Params, teacher: Params) -> Any:
        target, weights = batch["target"], batch["target_weights"]
        logits = []
        for tree in (params, teacher):
            model = golden.model_def.bind(tree)
            logits.append(model.decoder(target, target != 0, *ForwardPass(model, batch).instruction_memory))
        soft = teacher_probabilities(ForwardPass(golden.model_def.bind(teacher), batch))
        sums = (1 - alpha) * summed_answer_loss(logits[0], target, weights)
        sums += alpha * summed_distillation_loss(logits[0], soft, weights, softmax_axis=config.softmax_axis)
        return sums, logits[1][:, :-1], soft

    sums, teacher_logits, soft = run(golden.params, teacher)
    yield f"vqa_loss_distill_alpha{alpha}_per_answer", np.asarray(sums)[rows]
    yield "teacher_logits", np.asarray(teacher_logits)[rows]
    yield "teacher_probs", np.asarray(soft)[rows]


# --- gradients and training -------------------------------------------------------------------------------------------


class JaxRunner:
    """Computes our model's numbers."""

    def __init__(self, golden: Golden) -> None:
        self.golden = golden
        caption = golden.model == "caption"
        self._batch = _caption_batch(golden) if caption else _question_batch(golden)
        objective = caption_loss if caption else answer_loss
        # One program for loss and gradients: compiling it takes longer than everything else here.
        self._loss_and_gradients = jax.jit(
            jax.value_and_grad(lambda p: objective(ForwardPass(golden.model_def.bind(p), self._batch)).loss)
        )

    def load_summary(self) -> str:
        """Return how many of the checkpoint's tensors were loaded."""
        return self.golden.load_summary

    def arrays(self) -> NamedArrays:
        """Compute every array in the golden's outputs."""
        return compute_caption(self.golden) if self.golden.model == "caption" else compute_videoqa(self.golden)

    def gradients(self, alpha: float | None = None) -> Mapping[str, HostArray]:
        """Compute gradients of the loss; with ``alpha``, of the distillation loss, after one update of the teacher."""
        golden = self.golden
        if alpha is None:
            return _to_official(golden, self._loss_and_gradients(golden.params)[1])
        distilled = jax.jit(jax.grad(_distilled_loss(golden, self._batch, alpha)))
        return _to_official(golden, distilled(golden.params, _updated_teacher(golden)))

    def updated_teacher(self) -> Mapping[str, HostArray]:
        """Return the teacher after one update, under the teacher's names."""
        return with_teacher_names(_to_official(self.golden, _updated_teacher(self.golden)))

    def train(self) -> tuple[list[float], Mapping[str, HostArray]]:
        """Return the losses before every AdamW step and after the last, and the final parameters, the teacher's too.

        The optimizer has the release's parameter groups; the teacher, if there is one, is updated before every loss.
        """
        golden, train = self.golden, self.golden.settings["train"]
        config = OptimizerConfig(
            weight_decay=train["weight_decay"], b1=train["betas"][0], b2=train["betas"][1], eps=train["eps"],
            decay_mask="released", clip_norm=0.0,
        )  # fmt: skip
        optimizer = make_optimizer(config, train["lr_other"], train["lr_visual"])
        frozen = released_distillation(golden, alpha=0.0).frozen

        @jax.jit
        def step(params: Params, state: Any, gradients: Params) -> Any:
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        params, teacher, losses = golden.params, golden.teacher, []
        state = optimizer.init(params)
        for i in range(train["steps"] + 1):
            if teacher is not None:
                teacher = ema_update(teacher, params, golden.settings["momentum"], frozen=frozen)
            value, gradients = self._loss_and_gradients(params)
            losses.append(float(value))
            if i < train["steps"]:
                params, state = step(params, state, gradients)
        trained = _to_official(golden, params)
        return losses, trained if teacher is None else trained | with_teacher_names(_to_official(golden, teacher))


def _updated_teacher(golden: Golden) -> Params:
    assert golden.teacher is not None
    config = released_distillation(golden, alpha=golden.settings["alpha"])
    return ema_update(golden.teacher, golden.params, config.momentum, frozen=config.frozen)
