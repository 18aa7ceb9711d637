"""The two released models: captions of an image or video clip, and answers to questions about it.

Axis letters as in ``layers``; also a answers of all questions together, t frames, n patches per frame, v vocabulary.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from .config import Config, read_config
from .decoder import DecoderMemory, TextDecoder
from .layers import BERT_EPS, Taps, tap
from .loading import NamePatterns, choose_weights, ignored_patterns, read_weights, select_state
from .search import DecodeOutput, SearchConfig, generate, rank_answers
from .text import FusionEncoder, TextEncoder
from .vision import VisionTower, normalize_pixels

Model = TypeVar("Model", bound="Mplug2")  # not typing.Self, which the tests' run-time type checks do not support


class VisualEncoder(nn.Module):
    """The image half of a CLIP, under the release's name."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.visual = VisionTower(config)


class Mplug2(nn.Module):
    """The common part of both models: the visual encoder, the decoder, and loading."""

    encodes_text: ClassVar[bool]

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.visual_encoder = VisualEncoder(config)
        if config.vision_width != config.width:
            self.visn_fc = nn.Linear(config.vision_width, config.width)
            self.visn_layer_norm = nn.LayerNorm(config.width, BERT_EPS)
        self.text_encoder = TextEncoder(config, text=self.encodes_text)
        self.visn_emb_norm = nn.LayerNorm(config.width, BERT_EPS)
        self.text_decoder = TextDecoder(config)
        self.dropout = nn.Dropout(config.dropout)
        self.config = config
        self.dropped: Mapping[str, str] = {}  # the checkpoint's tensors that the model ignores, with reasons

    @classmethod
    def from_pretrained(
        cls: type[Model], path: Path | str, config: Config | None = None, *, teacher: bool = False
    ) -> Model:
        """Load the model from a folder with ``config.json`` and one weights file, or from a weights file; in eval mode.

        Args:
            path: a folder or a file, ``.safetensors`` or ``.pth``.
            config: sizes, instead of the ``config.json`` next to the weights.
            teacher: load the teacher's copy of every tensor (names with ``_m``), not the student's.

        Raises:
            UserError: a file is missing or damaged, or its tensors do not match the model.
        """
        path = Path(path)
        weights = choose_weights(path) if path.is_dir() else path
        model = cls(config or read_config(weights.parent / "config.json"))
        model.load_official(read_weights(weights), teacher=teacher, where=weights)
        return model.eval()

    def load_official(
        self, tensors: Mapping[str, Tensor], *, teacher: bool = False, where: Path | str = "state"
    ) -> None:
        """Load named tensors of the release's layout; ``dropped`` lists those that the model ignores.

        Raises:
            UserError: the tensors do not match the model; ``where`` names their source in the message.
        """
        state, self.dropped = select_state(
            tensors, self.state_dict(), self.ignored_names(), teacher=teacher, where=where
        )
        self.load_state_dict(state, strict=True)

    def ignored_names(self) -> NamePatterns:
        """Return patterns of the names of tensors that the model ignores, with reasons."""
        return ignored_patterns(self.config, text=self.encodes_text)

    def with_default_tokens(self, search: SearchConfig) -> SearchConfig:
        """Return a search with the model's begin and end tokens, if it has none.

        Raises:
            UserError: a token is not in the vocabulary.
        """
        begin = self.config.bos_token_id if search.begin is None else search.begin
        end = self.config.eos_token_id if search.end is None else search.end
        for name, token in (("begin", begin), ("end", end)):
            if token >= self.config.vocab_size:
                raise UserError(
                    f"the {name} token is {token}, expected less than vocab_size={self.config.vocab_size}; set "
                    "bos_token_id and eos_token_id of config.json to the tokenizer's [CLS] and [SEP]"
                )
        return dataclasses.replace(search, begin=begin, end=end)

    def encode_visual(self, frames: Tensor, taps: Taps | None = None) -> Tensor:
        """Encode normalized frames [b, 3, t, y, x] (images: t = 1) -> visual tokens [b, s, d], s = 1 + t*n."""
        v = self.visual_encoder.visual(frames, taps)
        if self.config.vision_width != self.config.width:
            v = self.dropout(self.visn_layer_norm(self.visn_fc(v)))
        tap(taps, "visual/in", v)
        v = self.dropout(self.visn_emb_norm(v + self.text_encoder.encode_visual(v, taps)))
        tap(taps, "visual/out", v)
        return v


class Caption(Mplug2):
    """Captions of images and video clips, from visual tokens alone."""

    encodes_text = False

    def forward(self, frames: Tensor, target: Tensor, target_weights: Tensor, taps: Taps | None = None) -> Tensor:
        """Compute the loss of captions [b, m]: mean cross entropy over the batch's tokens with a weight, a scalar.

        ``target`` is ``[CLS] words [SEP] pad``. ``target_weights`` [b, m] are 0 for tokens that are not predicted:
        padding, and the prompt if there is one.
        """
        logits = self.text_decoder(target, target != 0, self.encode_visual(frames, taps), taps=taps)
        weights = target_weights[:, 1:]
        total = weights.sum()
        return (next_token_loss(logits, target) * weights).sum() / total.where(total > 0, 1.0)

    @torch.no_grad()
    def generate(self, frames: Tensor, search: SearchConfig | None = None) -> DecodeOutput:
        """Generate captions by beam search; by default of 4 to 20 tokens, as in the release."""
        memory = self.encode_visual(frames)
        mask = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device)
        search = self.with_default_tokens(search or SearchConfig(min_length=4, max_length=20))
        return generate(self.text_decoder, self.text_decoder.project(memory, mask), search)


class VideoQA(Mplug2):
    """Answers to questions about images and video clips."""

    encodes_text = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.fusion_encoder = FusionEncoder(config)

    def instruction_memory(
        self, frames: Tensor, question: Tensor, question_mask: Tensor, taps: Taps | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the decoder's memory, [visual tokens, fused question] [b, s + l, d], and its mask [b, s + l]."""
        text = self.text_encoder(question, question_mask, taps)
        visual, fused = self.fusion_encoder(text, question_mask, self.encode_visual(frames, taps), taps)
        mask = torch.cat([question_mask.new_ones(visual.shape[:2]), question_mask], dim=1)
        return torch.cat([visual, fused], dim=1), mask

    def answer_logits(
        self,
        frames: Tensor,
        question: Tensor,
        question_mask: Tensor,
        target: Tensor,
        answers_per_question: Tensor | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """Return logits [a, m, v] of answers [a, m]; ``answers_per_question`` [b] if it is not one each."""
        memory, mask = self.instruction_memory(frames, question, question_mask, taps)
        if answers_per_question is not None:
            memory, mask = (x.repeat_interleave(answers_per_question, dim=0) for x in (memory, mask))
        logits: Tensor = self.text_decoder(target, target != 0, memory, mask, taps)
        return logits

    def forward(
        self,
        frames: Tensor,
        question: Tensor,
        question_mask: Tensor,
        target: Tensor,
        target_weights: Tensor,
        *,
        answers_per_question: Tensor | None = None,
        answer_weights: Tensor | None = None,
        teacher: "VideoQA | None" = None,
        alpha: float = 0.0,
        softmax_axis: Literal["vocabulary", "time"] = "vocabulary",
        taps: Taps | None = None,
    ) -> Tensor:
        """Compute the release's loss: the weighted sum over answers and tokens, divided by the number of questions.

        With a teacher it is (1 - alpha) * cross entropy + alpha * distillation, with a softmax over the vocabulary. The
        release's softmax is over time, and it drops alpha on the way to the decoder: its distillation has alpha = 0.

        Args:
            frames: normalized, [b, 3, t, y, x].
            question: ids [b, l].
            question_mask: [b, l], bool, True for valid tokens.
            target: answers ``[CLS] words [SEP] pad``, [a, m], grouped by question.
            target_weights: [a, m], 0 for tokens that are not predicted.
            answers_per_question: [b], if it is not one each.
            answer_weights: [a], default 1.
            teacher: a model of the same sizes, run without gradient; see :func:`update_teacher`.
            alpha: weight of the distillation.
            softmax_axis: the axis of the student's softmax in the distillation.
            taps: collects intermediates of the student.
        """
        batch = (frames, question, question_mask, target, answers_per_question)
        logits = self.answer_logits(*batch, taps)
        sums = summed_answer_loss(logits, target, target_weights)
        if teacher is not None:
            with torch.no_grad():
                soft = teacher.answer_logits(*batch)[:, :-1].float().softmax(-1)
            sums = (1 - alpha) * sums + alpha * summed_distillation_loss(
                logits, soft, target_weights, softmax_axis=softmax_axis
            )
        if answer_weights is not None:
            sums = sums * answer_weights
        return sums.sum() / frames.shape[0]

    @torch.no_grad()
    def generate(
        self, frames: Tensor, question: Tensor, question_mask: Tensor, search: SearchConfig | None = None
    ) -> DecodeOutput:
        """Generate answers by beam search; by default of 1 to 10 tokens, as in the release."""
        memory, mask = self.instruction_memory(frames, question, question_mask)
        search = self.with_default_tokens(search or SearchConfig(min_length=1, max_length=10))
        return generate(self.text_decoder, self.text_decoder.project(memory, mask), search)

    @torch.no_grad()
    def rank_answers(
        self,
        frames: Tensor,
        question: Tensor,
        question_mask: Tensor,
        answers: Tensor,
        *,
        num_candidates: int = 128,
        double_count_first_token: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Return the best answers of [a, m] to each question, [b, num_candidates], and their probabilities."""
        memory, mask = self.instruction_memory(frames, question, question_mask)
        num_candidates = min(num_candidates, answers.shape[0])
        return rank_answers(
            self.text_decoder, memory, mask, answers, answers != 0, num_candidates=num_candidates,
            double_count_first_token=double_count_first_token,
        )  # fmt: skip


class Encode(nn.Module):
    """Pixels, and a question's token ids if the model reads one -> the decoder's memory: a program of its own."""

    def __init__(self, model: Caption | VideoQA) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, frames: Tensor, question: Tensor | None = None, question_mask: Tensor | None = None
    ) -> DecoderMemory:
        """Encode frames, uint8 [b, t, y, x, 3], and a question [b, l]."""
        pixels = normalize_pixels(frames)
        if isinstance(self.model, VideoQA):
            assert question is not None
            assert question_mask is not None
            memory, mask = self.model.instruction_memory(pixels, question, question_mask)
        else:
            memory = self.model.encode_visual(pixels)
            mask = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device)
        return self.model.text_decoder.project(memory, mask)


def next_token_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross entropy of each next token, [a, m - 1], from logits [a, m, v] and ids [a, m]."""
    return F.cross_entropy(logits[:, :-1].float().transpose(1, 2), target[:, 1:], reduction="none")


def summed_answer_loss(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Return the release's loss of each answer, [a]: the sum over its tokens."""
    return (next_token_loss(logits, target) * weights[:, 1:]).sum(-1)


def summed_distillation_loss(
    logits: Tensor, teacher_probabilities: Tensor, weights: Tensor, *, softmax_axis: Literal["vocabulary", "time"]
) -> Tensor:
    """Return the cross entropy with a teacher's distribution [a, m - 1, v], summed over each answer's tokens, [a]."""
    log_probs = logits[:, :-1].float().log_softmax(-1 if softmax_axis == "vocabulary" else 1)
    return (-(log_probs * teacher_probabilities).sum(-1) * weights[:, 1:]).sum(-1)


@torch.no_grad()
def update_teacher(teacher: Mplug2, student: Mplug2, momentum: float = 0.995, *, frozen: Collection[str] = ()) -> None:
    """Set every parameter to momentum * teacher + (1 - momentum) * student, in place.

    ``frozen`` names modules of the teacher that are not updated; in the release it is ``["fusion_encoder"]``.
    """
    student_params = dict(student.named_parameters())
    for name, param in teacher.named_parameters():
        if name.partition(".")[0] not in frozen:
            param.mul_(momentum).add_(student_params[name], alpha=1 - momentum)


def parameter_groups(
    model: Mplug2, *, learning_rate: float, vision_learning_rate: float, weight_decay: float
) -> list[dict[str, list[nn.Parameter] | float]]:
    """Return the release's groups for ``torch.optim.AdamW``: vision and others, decayed or not.

    Names with "bias" or "LayerNorm.weight" are not decayed; CLIP's norms, latents and embeddings are.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rate = vision_learning_rate if name.startswith("visual_encoder.") else learning_rate
        decay = 0.0 if "bias" in name or "LayerNorm.weight" in name else weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
