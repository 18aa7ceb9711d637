"""The processor of an exported folder, for transformers' ``AutoProcessor``: reads files as ``mplug2 generate`` does."""

import importlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from .mplug2_runtime import copy_companions, find_runtime

Visual = str | Path | Image.Image


class Mplug2Processor(ProcessorMixin):
    """Reads images, clips and questions for ``Mplug2Model``, and decodes what it generates.

    Args:
        folder: with the settings and the tokenizer.

    Raises:
        ImportError: see ``mplug2_runtime``.
        UserError: the settings are missing or damaged.
        DataError: the tokenizer is missing or damaged.
    """

    attributes: ClassVar[list[str]] = []

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        exported = importlib.import_module("mplug2_torch.conversion.exported.model")
        self._preprocessor = exported.Preprocessor(folder)
        self._normalize, self._pad = exported.normalize_pixels, exported.pad
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._answers, self._max_positions = config["task"] == "videoqa", config["max_positions"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "Mplug2Processor":
        """Read the processor of a folder or of a repository on the hub."""
        return cls(find_runtime(str(pretrained_model_name_or_path), kwargs.get("revision")))

    def save_pretrained(self, save_directory: str | Path, **unused: Any) -> list[str]:
        """Copy the files of the processor, and the code, into a folder."""
        return copy_companions(self._folder, Path(save_directory))

    def __call__(
        self, images: Visual | Sequence[Visual] | None = None, text: str | Sequence[str] | None = None,
        videos: Path | str | Sequence[Path | str] | None = None, **unused: Any,
    ) -> BatchFeature:  # fmt: skip
        """Return ``pixel_values`` [b, 3, t, y, x], and ``input_ids`` and ``attention_mask`` [b, l] of questions.

        Args:
            images: paths of images, or images of Pillow.
            text: a question for each image or clip; by default to describe it. Not for a model that captions.
            videos: paths of clips, in place of images.
            unused: as ``return_tensors``; they are PyTorch's.

        Raises:
            ValueError: images and clips together, neither, of another type; another number of questions, or questions
                to a captioner.
            DataError: a file is missing or damaged.
        """
        if (images is None) == (videos is None):
            raise ValueError("expected either images or videos; their numbers of frames differ, so use a call for each")
        items = [self._preprocessor.read(media) for media in self._media(images, videos)]
        frames = [frames for _, frames in items]
        if len({clip.shape for clip in frames}) > 1:
            raise ValueError(f"frames of shapes {', '.join(sorted({str(f.shape) for f in frames}))} make no batch")
        batch = {"pixel_values": self._normalize(torch.from_numpy(np.stack(frames)))}
        if not self._answers:
            if text is not None:
                raise ValueError("text is given, but this model captions, and has no part that reads a question")
            return BatchFeature(batch)
        questions = [default for default, _ in items] if text is None else _as_list(text)
        if len(questions) != len(items):
            raise ValueError(f"{len(questions)} texts for {len(items)} images or clips, expected one for each")
        rows = [self._preprocessor.encode_instruction(question, self._max_positions) for question in questions]
        ids = self._pad(rows, torch.device("cpu"))
        return BatchFeature(batch | {"input_ids": ids, "attention_mask": (ids != 0).long()})

    def _media(self, images: Any, videos: Any) -> list[Any]:
        """Return images and clips as the project's media; images of Pillow as PNG, which loses nothing."""
        media = importlib.import_module("data_pipelines.media")
        kind, items = ("image", images) if videos is None else ("video", videos)
        found = []
        for item in _as_list(items):
            data: str | bytes = str(item)
            if kind == "image" and isinstance(item, Image.Image):
                file = io.BytesIO()
                item.save(file, "PNG")
                data = file.getvalue()
            elif not isinstance(item, str | Path):
                raise ValueError(f"{kind}s hold a {type(item).__name__}, expected paths, or images of Pillow")
            found.append(media.Media(kind, data, str(item)))
        return found

    def decode(self, ids: Any, **unused: Any) -> str:
        """Return the text of generated ids [m]."""
        text: str = self._preprocessor.decode([token for token in np.asarray(ids).tolist() if token != 0])
        return text

    def batch_decode(self, ids: Any, **unused: Any) -> list[str]:
        """Return the texts of generated ids [b, m]."""
        return [self.decode(row) for row in ids]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
