"""Detect what a file of weights is, the official release, a CLIP or a BERT, and its sizes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from mplug2_jax.conversion.files.open import open_source
from mplug2_jax.conversion.files.sources import TensorSource, rename_tensors
from mplug2_jax.conversion.layouts import bert, clip, official
from mplug2_jax.conversion.layouts.name_mapping import first_few
from mplug2_jax.conversion.layouts.official_config import sizes_from_export, sizes_from_settings, sizes_from_shapes
from mplug2_jax.conversion.layouts.settings import (
    HUGGING_FACE,
    Architecture,
    bert_architecture,
    clip_architecture,
    read_settings,
    settings_folder,
)
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig

CheckpointKind = Literal["official", "clip", "bert"]
OfficialTask = Literal["caption", "videoqa"]


@dataclasses.dataclass(frozen=True)
class DetectedCheckpoint:
    """A source identified by its tensors' names; those of ``tensors`` are canonical."""

    path: Path
    kind: CheckpointKind
    title: str
    tensors: TensorSource
    layout: str

    @property
    def task(self) -> OfficialTask | None:
        """Return which of the release's two models an official checkpoint is; None if unknown.

        The state dicts of both have the same names. The settings next to the weights may tell, and only question
        answering has a teacher.
        """
        task = (self.settings or {}).get("task")
        if task in get_args(OfficialTask):
            return task
        return "videoqa" if self.has_teacher else None

    @property
    def has_teacher(self) -> bool:
        """Return whether an official checkpoint holds the averaged copy."""
        return any(name.startswith("text_decoder_m.") for name in self.tensors.names())

    @functools.cached_property
    def settings(self) -> Mapping[str, Any] | None:
        """Return the ``config.json`` next to an official checkpoint, if it is the release's or an export's."""
        settings = read_settings(settings_folder(self.path) / HUGGING_FACE)
        return settings if {"vision", "bert"} <= set(settings) or "vision_width" in settings else None

    @functools.cached_property
    def sizes(self) -> tuple[ModelConfig, int]:
        """Return our sizes for an official checkpoint, and its first fusion layer in use."""
        if self.settings is None:
            return sizes_from_shapes(self.tensors)
        if "vision_width" in self.settings:
            return sizes_from_export(self.settings)
        return sizes_from_settings(self.settings, self.tensors)

    @functools.cached_property
    def model_fields(self) -> dict[str, Any]:
        """Return the ModelConfig fields that the shapes and settings of a CLIP or a BERT determine."""
        if self.kind == "bert":
            return self._sizes_from_shapes | {"heads": self._architecture.heads}
        return self._sizes_from_shapes | {
            "vision_heads": self._architecture.heads,
            "vision_activation": self._architecture.activation,
        }

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Return sentences about what neither shapes nor settings determine."""
        if self.kind != "official":
            return self._architecture.assumptions
        if self.settings is not None:
            return ()
        return (f"heads and fusion layers assumed as in the release: no {HUGGING_FACE} next to {self.path.name}",)

    @functools.cached_property
    def _sizes_from_shapes(self) -> dict[str, Any]:
        read_sizes: Mapping[str, Callable[[TensorSource], dict[str, Any]]] = {
            "bert": bert.sizes, "openai": clip.openai_sizes, "hugging_face": clip.hugging_face_sizes
        }  # fmt: skip
        try:
            return read_sizes[self.layout](self.tensors)
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(
                f"{self.path} is not a {self.title}, though some of its names are: a tensor is missing or of another "
                f"shape ({error}); import another model"
            ) from error

    @functools.cached_property
    def _architecture(self) -> Architecture:
        if self.kind == "bert":
            return bert_architecture(self.path, self._sizes_from_shapes)
        return clip_architecture(self.path, self._sizes_from_shapes, openai=self.layout == "openai")

    @property
    def has_mlm_head(self) -> bool:
        """Return whether a BERT has its masked-language-modeling head."""
        return f"{bert.HEAD}.transform.dense.weight" in self.tensors.names()


def identify(path: Path) -> DetectedCheckpoint:
    """Open a file or folder of weights and detect what they are.

    Raises:
        UserError: it is not a checkpoint, or one of another model.
    """
    source = open_source(path)
    names = source.names()
    if empty := [name for name in names if 0 in source.info(name).shape]:
        raise UserError(
            f"{path}: {len(empty)} of {len(names)} tensors are empty ({first_few(empty, 1)}), as in DeepSpeed's files "
            "with ZeRO stage 3, which divides them between files: merge these with its zero_to_fp32.py"
        )
    canonical = official.canonical_names(names)
    if official.is_official(list(canonical)):
        return DetectedCheckpoint(path, "official", "official mPLUG-2", rename_tensors(source, canonical), "official")
    if tower := clip.find_other_tower(names):
        raise UserError(
            f"{path} holds weights of {tower}; expected CLIP's ViT, as OpenAI, open_clip and Hugging Face have it"
        )
    openai = clip.openai_names(names)
    if clip.is_openai(list(openai)):
        return DetectedCheckpoint(path, "clip", "CLIP (OpenAI)", rename_tensors(source, openai), "openai")
    hugging_face = clip.canonical_names(names)
    if clip.is_hugging_face(list(hugging_face)):
        return DetectedCheckpoint(
            path, "clip", "CLIP (Hugging Face)", rename_tensors(source, hugging_face), "hugging_face"
        )
    if variant := bert.find_variant(names):
        raise UserError(
            f"{path} holds weights of {variant} ({first_few(names, 1)}), whose positions, vocabulary or layers differ "
            "from BERT's; expected a BERT, a CLIP or an official checkpoint"
        )
    canonical = bert.canonical_names(names)
    if bert.is_bert(list(canonical)):
        tensors = rename_tensors(source, canonical, bert.find_transposed(canonical))
        return DetectedCheckpoint(path, "bert", "BERT", tensors, "bert")
    raise UserError(
        f"{path} holds {len(names)} tensors ({first_few(names)}) of an unknown model; expected an official "
        "checkpoint, a CLIP or a BERT"
    )
