"""Compute the PyTorch runtime's numbers for a golden folder; ``comparison`` compares them with the release's."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mplug2_jax.conversion.files.sources import HostArray
from mplug2_jax.conversion.parity.comparison import (
    NamedArrays,
    find_numbers,
    make_caption_weights,
    name_beam_arrays,
    name_intermediates,
    with_teacher_names,
)  # fmt: skip
from mplug2_jax.conversion.parity.goldens import Golden
from mplug2_jax.conversion.torch_runtime import (
    Caption,
    Config,
    SearchConfig,
    Taps,
    VideoQA,
    parameter_groups,
    update_teacher,
)  # fmt: skip
from mplug2_jax.conversion.torch_runtime.model import Mplug2, summed_answer_loss, summed_distillation_loss
from mplug2_jax.conversion.torch_runtime.search import generate

Model = TypeVar("Model", bound=Mplug2)


class TorchRunner:
    """A :class:`~mplug2_jax.conversion.parity.comparison.Runner` for the PyTorch runtime, in evaluation mode."""

    def __init__(self, golden: Golden) -> None:
        self.golden = golden
        self._model_class: type[Caption] | type[VideoQA] = Caption if golden.model == "caption" else VideoQA

    def load_summary(self) -> str:
        """Return how many of the checkpoint's tensors were loaded."""
        total, dropped = len(self.golden.source.names()), len(load(self.golden, self._model_class).dropped)
        return f"{total - dropped} converted, {dropped} ignored of {total}"

    def arrays(self) -> NamedArrays:
        """Compute every array in the golden's outputs."""
        compute = compute_caption if self._model_class is Caption else compute_videoqa
        with torch.no_grad():  # a generator would leave it before it ends
            return iter(list(compute(self.golden)))

    def gradients(self, alpha: float | None = None) -> Mapping[str, HostArray]:
        """Compute gradients of the loss; with ``alpha``, of the distillation loss, after one update of the teacher."""
        model = load(self.golden, self._model_class)
        if alpha is None:
            _loss(self.golden, model).backward()
        else:
            _distilled_loss(self.golden, model, _updated_teacher(self.golden), alpha).backward()
        return {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}

    def updated_teacher(self) -> Mapping[str, HostArray]:
        """Return the teacher after one update, under the teacher's names."""
        return with_teacher_names(_values(_updated_teacher(self.golden)))

    def train(self) -> tuple[list[float], Mapping[str, HostArray]]:
        """Return the losses before every AdamW step and after the last, and the final parameters, the teacher's too."""
        golden, settings = self.golden, self.golden.settings["train"]
        model, losses = load(golden, self._model_class), []
        teacher = load(golden, self._model_class, teacher=True) if golden.teacher is not None else None
        groups = parameter_groups(
            model, learning_rate=settings["lr_other"], vision_learning_rate=settings["lr_visual"],
            weight_decay=settings["weight_decay"],
        )  # fmt: skip
        optimizer = torch.optim.AdamW(groups, betas=tuple(settings["betas"]), eps=settings["eps"])
        for i in range(settings["steps"] + 1):
            if teacher is not None:
                _update_teacher(golden, teacher, model)
            loss = _loss(golden, model)
            losses.append(loss.item())
            if i < settings["steps"]:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return losses, _values(model) if teacher is None else _values(model) | with_teacher_names(_values(teacher))


# --- models and losses ------------------------------------------------------------------------------------------------


def load(golden: Golden, model_class: type[Model], *, teacher: bool = False, **overrides: Any) -> Model:
    """Load a golden's model; ``overrides`` are sizes that change no tensor in use."""
    sizes = dataclasses.asdict(golden.model_def.config) | {"fusion_start": golden.fusion_start} | overrides
    config = Config(**{field.name: sizes[field.name] for field in dataclasses.fields(Config) if field.name in sizes})
    model = model_class(config)
    tensors = {name: torch.from_numpy(golden.source.read(name)) for name in golden.source.names()}
    model.load_official(tensors, teacher=teacher, where=golden.source.path)
    return model.eval()


def _inputs(golden: Golden, *names: str) -> list[Tensor]:
    """Return inputs by name; masks as booleans."""
    inputs = (torch.from_numpy(golden.inputs[name]) for name in names)
    return [x.bool() if name.endswith("_mask") else x for name, x in zip(names, inputs, strict=True)]


def _question_batch(golden: Golden) -> dict[str, Tensor]:
    """Return the question-answering model's arguments that all losses share."""
    names = ("image", "question_ids", "question_mask", "answer_ids", "answer_k")
    arguments = ("frames", "question", "question_mask", "target", "answers_per_question")
    return dict(zip(arguments, _inputs(golden, *names), strict=True))


def _loss(golden: Golden, model: Caption | VideoQA, **distillation: Any) -> Tensor:
    if isinstance(model, Caption):
        frames, target = _inputs(golden, "image", "caption_ids")
        loss: Tensor = model(frames, target, torch.from_numpy(make_caption_weights(golden)))
    else:
        mask, weights = _inputs(golden, "answer_mask", "answer_weights")
        loss = model(**_question_batch(golden), target_weights=mask.float(), answer_weights=weights, **distillation)
    return loss


def _distilled_loss(golden: Golden, model: Caption | VideoQA, teacher: VideoQA, alpha: float) -> Tensor:
    """Return the distillation loss as in the release, which normalizes over time."""
    return _loss(golden, model, teacher=teacher, alpha=alpha, softmax_axis="time")


def _update_teacher(golden: Golden, teacher: Caption | VideoQA, model: Caption | VideoQA) -> None:
    """Update the teacher as in the release, which never updates its fusion module."""
    update_teacher(teacher, model, golden.settings["momentum"], frozen=["fusion_encoder"])


def _updated_teacher(golden: Golden) -> VideoQA:
    teacher = load(golden, VideoQA, teacher=True)
    _update_teacher(golden, teacher, load(golden, VideoQA))
    return teacher


def _values(model: Caption | VideoQA) -> dict[str, HostArray]:
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


# --- arrays -----------------------------------------------------------------------------------------------------------


def compute_caption(golden: Golden) -> NamedArrays:
    """Compute every array in the caption model's outputs."""
    model, taps = load(golden, Caption), Taps()
    frames, target = _inputs(golden, "image", "caption_ids")
    yield "caption_loss", _loss(golden, model).numpy()
    unmasked = torch.from_numpy(make_caption_weights(golden, masked_prompt=False))
    yield "caption_loss_no_prompt_mask", model(frames, target, unmasked).numpy()
    visual = model.encode_visual(frames, taps)
    logits = model.text_decoder(target, target != 0, visual, taps=taps)
    yield from name_intermediates(taps, golden, logits)
    yield from _run_searches(golden, model, visual, torch.ones(visual.shape[:2], dtype=torch.bool))


def compute_videoqa(golden: Golden) -> NamedArrays:
    """Compute every array in the question-answering model's outputs."""
    model, taps, batch = load(golden, VideoQA), Taps(), _question_batch(golden)
    question = batch["frames"], batch["question"], batch["question_mask"]
    logits = model.answer_logits(**batch, taps=taps)
    memory, mask = model.instruction_memory(*question)
    num_visual = taps["visual/out"].shape[1]
    fused = memory[:, :num_visual], memory[:, num_visual:]
    yield from name_intermediates(taps, golden, logits, fused=fused)
    for stride in find_numbers(golden, r"fusion_stride(\d+)_text"):
        fusion = load(golden, VideoQA, fusion_stride=stride).fusion_encoder
        image, text = fusion(taps["text/out"], batch["question_mask"], taps["visual/out"])
        yield f"fusion_stride{stride}_image", image.numpy()
        yield f"fusion_stride{stride}_text", text.numpy()
    yield "dec_memory", memory.numpy()
    yield "dec_memory_mask", mask.numpy().astype(golden.outputs["dec_memory_mask"].dtype)
    yield "vqa_loss", _loss(golden, model).numpy()
    (weights,) = _inputs(golden, "answer_mask")
    yield "vqa_loss_per_answer", summed_answer_loss(logits, batch["target"], weights).numpy()
    if golden.teacher is not None:
        yield from _compute_distillation(golden, model, logits, batch)
    yield from _run_searches(golden, model, memory, mask)
    (candidates,) = _inputs(golden, "cand_ids")
    ids, probabilities = model.rank_answers(*question, candidates, num_candidates=golden.settings["rank_k"])
    yield "rank_ids", ids.numpy()
    yield "rank_probs", probabilities.numpy()


def _compute_distillation(golden: Golden, model: VideoQA, logits: Tensor, batch: Mapping[str, Tensor]) -> NamedArrays:
    alpha, teacher = golden.settings["alpha"], _updated_teacher(golden)
    # The release has an alpha but drops it on the way to the decoder: its distillation has alpha = 0.
    yield "vqa_loss_release_distill", _distilled_loss(golden, model, teacher, 0.0).numpy()
    yield f"vqa_loss_distill_alpha{alpha}", _distilled_loss(golden, model, teacher, alpha).numpy()
    teacher_logits = teacher.answer_logits(**batch, taps=None)[:, :-1]
    soft, target = teacher_logits.softmax(-1), batch["target"]
    (weights,) = _inputs(golden, "answer_mask")
    sums = (1 - alpha) * summed_answer_loss(logits, target, weights)
    sums = sums + alpha * summed_distillation_loss(logits, soft, weights, softmax_axis="time")
    yield f"vqa_loss_distill_alpha{alpha}_per_answer", sums.numpy()
    yield "teacher_logits", teacher_logits.numpy()
    yield "teacher_probs", soft.numpy()


def _run_searches(golden: Golden, model: Caption | VideoQA, memory: Tensor, mask: Tensor) -> NamedArrays:
    """Run beam searches with every width in the outputs."""
    settings = golden.settings
    for width in find_numbers(golden, r"beam(\d+)_ids"):
        config = SearchConfig(
            num_beams=width, begin=settings["bos"], end=settings["eos"], **settings[f"{golden.model}_generation"]
        )
        ids, scores, lengths = (
            np.asarray(x) for x in generate(model.text_decoder, model.text_decoder.project(memory, mask), config)
        )
        yield from name_beam_arrays(golden, width, ids, lengths, scores)
