"""An exported folder, opened: predictions, ranks and features of images and clips, as the project computes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipelines.config import ExampleConfig, VisualConfig
from data_pipelines.examples import default_instruction, encode_answer, encode_instruction, make_detokenizer
from data_pipelines.media import file_media
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.visual import load_visual

from ...errors import UserError, check_range
from ..torch_runtime import Caption, SearchConfig, VideoQA, normalize_pixels
from ..torch_runtime.config import read_json
from ..torch_runtime.search import generate, rank_answers
from . import INFERENCE, SETTINGS

_REMEDY = "copy the whole folder of the export"
KINDS: dict[str, type[Caption] | type[VideoQA]] = {"caption": Caption, "videoqa": VideoQA}


class Prediction(NamedTuple):
    """A generated text, and its token ids from the begin token on."""

    text: str
    ids: list[int]


class ExportedModel:
    """The model of a folder. In float32 it gives the same tokens as ``mplug2 generate`` with the run.

    Args:
        folder: written by ``mplug2 convert export``.
        device: to compute on, as "cuda" or "cpu".
        dtype: to compute in.

    Raises:
        UserError: a file is missing or damaged, the files do not match each other, or the device cannot be used.
        DataError: the tokenizer is missing or damaged.
    """

    def __init__(self, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        task = read_json(folder / SETTINGS, _REMEDY).get("task")
        if task not in KINDS:
            raise UserError(f"{folder / SETTINGS}: task is {task!r}, expected {' or '.join(KINDS)}; export again")
        self._visual, self._examples, search = _read_inference(folder / INFERENCE)
        self._tokenizer = load_tokenizer(folder)
        model = KINDS[task].from_pretrained(folder)
        if self._tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer in {folder} has {self._tokenizer.vocab_size} tokens, but the model has vocab_size="
                f"{model.config.vocab_size}; copy both from the same export"
            )
        self._search = model.with_default_tokens(search)
        self._decode = make_detokenizer(self._examples, self._tokenizer)
        try:
            self._device = torch.device(device)
            self.model = model.to(self._device, dtype)
        except (RuntimeError, AssertionError) as error:  # the latter if PyTorch was built without CUDA
            reason = str(error).partition("\n")[0].rstrip(".")
            raise UserError(f"the device {device!r} cannot be used ({reason}); choose another, as 'cpu'") from error

    @torch.inference_mode()
    def generate(self, path: Path, instruction: str | None = None) -> Prediction:
        """Return a caption of an image or a clip, or an answer to an instruction about it.

        Raises:
            UserError: the model captions only, and there is an instruction.
            DataError: the file is missing, damaged, or has no frame.
        """
        memory, mask = self._memory(path, instruction)
        output = generate(self.model.text_decoder, memory, mask, self._search)
        ids = output.ids[0, 0, : int(output.lengths[0, 0])].tolist()
        return Prediction(self._decode(ids), ids)

    @torch.inference_mode()
    def rank(self, path: Path, candidates: Sequence[str], instruction: str | None = None) -> list[tuple[str, float]]:
        """Return candidate captions or answers, the likeliest first, with their probabilities among all.

        Raises:
            UserError: as :meth:`generate`; or a candidate is longer than the decoder's position table.
            DataError: as :meth:`generate`.
        """
        memory, mask = self._memory(path, instruction)
        rows = [encode_answer(text, self._examples, self._tokenizer) for text in candidates]
        length = max(map(len, rows))
        answers = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=self._device)
        order, probabilities = rank_answers(
            self.model.text_decoder, memory, mask, answers, answers != 0, num_candidates=len(rows),
            double_count_first_token=self._examples.tokenization == "released",
        )  # fmt: skip
        return [(candidates[i], p) for i, p in zip(order[0].tolist(), probabilities[0].tolist(), strict=True)]

    @torch.inference_mode()
    def embed(self, path: Path) -> list[float]:
        """Return the mean of the visual tokens, which is feature "pooled" of ``mplug2 embed``. Raises DataError."""
        mean = self.model.encode_visual(self._read(path)[1]).float().mean(1)[0]
        values: list[float] = mean.tolist()
        return values

    def _read(self, path: Path) -> tuple[str, Tensor]:
        """Return a file's default instruction and its normalized frames."""
        media = file_media(path)
        frames = load_visual(media, self._visual, np.random.default_rng(0)).frames
        return default_instruction(media.kind), normalize_pixels(torch.tensor(frames[None], device=self._device))

    def _memory(self, path: Path, instruction: str | None) -> tuple[Tensor, Tensor]:
        """Return the decoder's memory [1, s, d] and its mask [1, s]."""
        if isinstance(self.model, VideoQA):
            default, frames = self._read(path)
            text = instruction or default
            ids = encode_instruction(text, self._examples, self._tokenizer, self.model.config.max_positions)
            question = torch.tensor([ids], device=self._device)
            return self.model.instruction_memory(frames, question, torch.ones_like(question, dtype=torch.bool))
        if instruction:
            raise UserError("this model captions, and has no part that reads a question; ask without one")
        visual = self.model.encode_visual(self._read(path)[1])
        return visual, torch.ones(visual.shape[:2], dtype=torch.bool, device=self._device)


def _read_inference(path: Path) -> tuple[VisualConfig, ExampleConfig, SearchConfig]:
    content = read_json(path, _REMEDY)
    try:
        visual, search = content["visual"], content["search"]
        for name, minimum in (("num_beams", 1), ("min_length", 0), ("max_length", 1)):
            check_range(f"search.{name}", search[name], minimum)
        config = VisualConfig(**visual | {"background": tuple(visual["background"])})
        return config, ExampleConfig(**content["examples"]), SearchConfig(**search)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} does not fit this version ({error!r}); copy it again") from error
