"""An exported folder, opened: predictions, ranks and features of images and clips, as the project computes them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipelines.media import file_media

from ...errors import UserError
from ..torch_runtime import Caption, VideoQA, normalize_pixels
from ..torch_runtime.config import read_json
from ..torch_runtime.decoder import DecodeFn, DecoderMemory, DecodeStep
from ..torch_runtime.model import Encode
from ..torch_runtime.search import generate, rank_answers
from . import CONFIG_NAME, REMEDY
from .preprocessing import Preprocessor

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
        compiled: compile with ``torch.compile``, which takes a minute at the first file of each number of frames.
        int8: round the weights of linear layers to 8 bits, with a scale per row; not the vision tower's fused ones.

    Raises:
        UserError: a file is missing or damaged, the files do not match each other, the device cannot be used, or the
            package for ``int8`` is not installed.
        DataError: the tokenizer is missing or damaged.
    """

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32, compiled: bool = False,
        int8: bool = False,
    ) -> None:  # fmt: skip
        task = read_json(folder / CONFIG_NAME, REMEDY).get("task")
        if task not in KINDS:
            raise UserError(f"{folder / CONFIG_NAME}: task is {task!r}, expected {' or '.join(KINDS)}; export again")
        self._preprocessor = Preprocessor(folder)
        model = KINDS[task].from_pretrained(folder)
        if self._preprocessor.tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"the tokenizer in {folder} has {self._preprocessor.tokenizer.vocab_size} tokens, but the model has "
                f"vocab_size={model.config.vocab_size}; copy both from the same export"
            )
        self._search = model.with_default_tokens(self._preprocessor.search)
        try:
            self._device = torch.device(device)
            self.model = model.to(self._device, dtype)
        except (RuntimeError, AssertionError) as error:  # the latter if PyTorch was built without CUDA
            reason = str(error).partition("\n")[0].rstrip(".")
            raise UserError(f"the device {device!r} cannot be used ({reason}); choose another, as 'cpu'") from error
        if int8:
            quantize_int8(self.model)
        self._encode: Callable[..., DecoderMemory] = Encode(self.model)
        self._step: DecodeFn = DecodeStep(self.model.text_decoder)
        if compiled:
            self._encode, self._step = (torch.compile(module, fullgraph=True) for module in (self._encode, self._step))

    def generate(self, path: Path, instruction: str | None = None) -> Prediction:
        """Return a caption of an image or a clip, or an answer to an instruction about it.

        Raises:
            UserError: the model captions only, and there is an instruction.
            DataError: the file is missing, damaged, or has no frame.
        """
        return self.generate_batch([path], instruction)[0]

    @torch.inference_mode()
    def generate_batch(self, paths: Sequence[Path], instruction: str | None = None) -> list[Prediction]:
        """Return a prediction for each file, in a batch for each number of frames. Raises as :meth:`generate`."""
        items = [self._read(path) for path in paths]
        predictions: dict[int, Prediction] = {}
        for shape in dict.fromkeys(item.frames.shape for item in items):
            rows = [i for i, item in enumerate(items) if item.frames.shape == shape]
            memory = self._encode_items([items[i] for i in rows], instruction)
            output = generate(self.model.text_decoder, memory, self._search, self._step)
            for i, ids, length in zip(rows, output.ids[:, 0], output.lengths[:, 0], strict=True):
                tokens = ids[: int(length)].tolist()
                predictions[i] = Prediction(self._preprocessor.decode(tokens), tokens)
        return [predictions[i] for i in range(len(items))]

    @torch.inference_mode()
    def rank(self, path: Path, candidates: Sequence[str], instruction: str | None = None) -> list[tuple[str, float]]:
        """Return candidate captions or answers, the likeliest first, with their probabilities among all.

        Raises:
            UserError: as :meth:`generate`; or a candidate is longer than the decoder's position table.
            DataError: as :meth:`generate`.
        """
        memory = self._encode_items([self._read(path)], instruction)
        rows = [self._preprocessor.encode_answer(text) for text in candidates]
        answers = pad(rows, self._device)
        order, probabilities = rank_answers(
            self.model.text_decoder, memory.tokens, memory.mask, answers, answers != 0, num_candidates=len(rows),
            double_count_first_token=self._preprocessor.double_count_first_token,
        )  # fmt: skip
        return [(candidates[i], p) for i, p in zip(order[0].tolist(), probabilities[0].tolist(), strict=True)]

    @torch.inference_mode()
    def embed(self, path: Path) -> list[float]:
        """Return the mean of the visual tokens, which is feature "pooled" of ``mplug2 embed``. Raises DataError."""
        frames = normalize_pixels(self._read(path).frames[None].to(self._device))
        values: list[float] = self.model.encode_visual(frames).float().mean(1)[0].tolist()
        return values

    def _read(self, path: Path) -> "_Item":
        instruction, frames = self._preprocessor.read(file_media(path))
        return _Item(instruction, torch.tensor(frames))

    def _encode_items(self, items: Sequence["_Item"], instruction: str | None) -> DecoderMemory:
        """Encode files of equally many frames."""
        frames = torch.stack([item.frames for item in items]).to(self._device)
        if isinstance(self.model, VideoQA):
            limit = self.model.config.max_positions
            texts = [instruction or item.instruction for item in items]
            ids = pad([self._preprocessor.encode_instruction(text, limit) for text in texts], self._device)
            return self._encode(frames, ids, ids != 0)
        if instruction:
            raise UserError("this model captions, and has no part that reads a question; ask without one")
        return self._encode(frames)


class _Item(NamedTuple):
    """A file: its default instruction, and its frames, uint8 [t, y, x, 3]."""

    instruction: str
    frames: Tensor


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return rows of ids as a tensor [b, l], padded with 0."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)


def quantize_int8(model: torch.nn.Module) -> None:
    """Round the weights of linear layers to 8 bits, in place. Raises UserError: torchao is not installed."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError(f"int8 needs the package torchao ({error}): pip install torchao") from error
    quantize_(model, Int8WeightOnlyConfig())
