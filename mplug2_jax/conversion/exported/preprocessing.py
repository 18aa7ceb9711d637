"""Preprocessing of an exported folder: frames and token ids of images, clips and instructions; texts of ids."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipelines.arrays import UInt8
from data_pipelines.config import ExampleConfig, VisualConfig
from data_pipelines.examples import default_instruction, encode_answer, encode_instruction, make_detokenizer
from data_pipelines.media import Media
from data_pipelines.tokenizers import load_tokenizer
from data_pipelines.visual import load_visual

from ...errors import UserError, check_range
from ..torch_runtime import SearchConfig
from ..torch_runtime.config import read_json
from . import INFERENCE, REMEDY


class Preprocessor:
    """The tokenizer and the settings of a folder.

    Raises:
        UserError: the settings are missing or damaged.
        DataError: the tokenizer is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._visual, self._examples, self.search = read_inference(folder)
        self.tokenizer = load_tokenizer(folder)
        self.double_count_first_token = self._examples.tokenization == "released"
        self._decode = make_detokenizer(self._examples, self.tokenizer)

    def read(self, media: Media) -> tuple[str, UInt8[np.ndarray, "t y x 3"]]:
        """Return the default instruction of an image or a clip, and its frames. Raises DataError: it is damaged."""
        return default_instruction(media.kind), load_visual(media, self._visual, np.random.default_rng(0)).frames

    def encode_instruction(self, text: str, max_length: int) -> list[int]:
        """Return the token ids of an instruction."""
        return encode_instruction(text, self._examples, self.tokenizer, max_length)

    def encode_answer(self, text: str) -> list[int]:
        """Return the token ids of a text that the decoder could generate, from the begin token on."""
        return encode_answer(text, self._examples, self.tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated token ids."""
        return self._decode(ids)


def read_inference(folder: Path) -> tuple[VisualConfig, ExampleConfig, SearchConfig]:
    """Return how a folder's model reads frames and texts, and how it searches. Raises UserError."""
    path = folder / INFERENCE
    content = read_json(path, REMEDY)
    try:
        visual, search = content["visual"], content["search"]
        for name, minimum in (("num_beams", 1), ("min_length", 0), ("max_length", 1)):
            check_range(f"search.{name}", search[name], minimum)
        config = VisualConfig(**visual | {"background": tuple(visual["background"])})
        return config, ExampleConfig(**content["examples"]), SearchConfig(**search)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} does not fit this version ({error!r}); copy it again") from error
