"""What a file of weights is: the official release, a CLIP or a BERT, and which sizes of ours it has."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from mplug2_jax.conversion.files.sources import RenamedSource, TensorSource, open_source
from mplug2_jax.conversion.layouts import bert, clip, official
from mplug2_jax.conversion.layouts.official_config import sizes_from_export, sizes_from_settings, sizes_from_shapes
from mplug2_jax.conversion.layouts.schemes import examples
from mplug2_jax.conversion.layouts.settings import (
    HUGGING_FACE,
    Architecture,
    bert_architecture,
    clip_architecture,
    read_settings,
)
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import ModelConfig

Kind = Literal["official", "clip", "bert"]
Task = Literal["caption", "videoqa"]


@dataclasses.dataclass(frozen=True)
class Found:
    """A source that was told by its names; ``source`` has canonical ones."""

    path: Path
    kind: Kind
    title: str
    source: TensorSource
    layout: str

    @property
    def task(self) -> Task | None:
        """Which of the release's two models an official checkpoint is of; None where it cannot be told.

        The state dicts of both have the same names. Settings beside the weights tell, and only question answering has a
        teacher.
        """
        named = (self.settings or {}).get("task")
        if named in get_args(Task):
            return named
        return "videoqa" if self.has_teacher else None

    @property
    def has_teacher(self) -> bool:
        """Whether an official checkpoint holds the averaged copy."""
        return any(name.startswith("text_decoder_m.") for name in self.source.names())

    @functools.cached_property
    def settings(self) -> Mapping[str, Any] | None:
        """The ``config.json`` beside an official checkpoint, if it has the release's settings or an export's."""
        settings = read_settings((self.path if self.path.is_dir() else self.path.parent) / HUGGING_FACE) or {}
        return settings if {"vision", "bert"} <= set(settings) or "vision_width" in settings else None

    @functools.cached_property
    def sizes(self) -> tuple[ModelConfig, int]:
        """Our sizes for an official checkpoint, and its first fusion layer in use."""
        if self.settings is None:
            return sizes_from_shapes(self.source)
        if "vision_width" in self.settings:
            return sizes_from_export(self.settings)
        return sizes_from_settings(self.settings, self.source)

    @functools.cached_property
    def fields(self) -> dict[str, Any]:
        """The fields of our sizes that a CLIP or a BERT tells, by its shapes and the settings beside it."""
        if self.kind == "bert":
            return self._shapes | {"heads": self._architecture.heads}
        return self._shapes | {
            "vision_heads": self._architecture.heads,
            "vision_activation": self._architecture.activation,
        }

    @property
    def assumed(self) -> tuple[str, ...]:
        """Sentences about what neither shapes nor settings tell."""
        if self.kind != "official":
            return self._architecture.assumed
        if self.settings is not None:
            return ()
        return (f"heads and fusion layers of the release's own sizes: no {HUGGING_FACE} beside {self.path.name}",)

    @functools.cached_property
    def _shapes(self) -> dict[str, Any]:
        if self.kind == "bert":
            return dict(bert.sizes(self.source))
        return clip.openai_sizes(self.source) if self.layout == "openai" else clip.hugging_face_sizes(self.source)

    @functools.cached_property
    def _architecture(self) -> Architecture:
        if self.kind == "bert":
            return bert_architecture(self.path, self._shapes)
        return clip_architecture(self.path, self._shapes, openai=self.layout == "openai")

    @property
    def has_head(self) -> bool:
        """Whether a BERT has its masked-language head."""
        return f"{bert.HEAD}.transform.dense.weight" in self.source.names()


def identify(path: Path) -> Found:
    """Opens a file or folder of weights and tells what they are.

    Raises:
        UserError: no checkpoint, or one of something else.
    """
    source = open_source(path)
    names = source.names()
    canonical = official.canonical_names(names)
    if official.is_official(list(canonical)):
        return Found(path, "official", "official mPLUG-2", RenamedSource(source, canonical), "official")
    whole = clip.openai_names(names)
    if clip.is_openai(list(whole)):
        return Found(path, "clip", "CLIP (OpenAI)", RenamedSource(source, whole), "openai")
    tower = clip.canonical_names(names)
    if clip.is_hugging_face(list(tower)):
        return Found(path, "clip", "CLIP (Hugging Face)", RenamedSource(source, tower), "hugging_face")
    if relative := bert.relative_of(names):
        raise UserError(
            f"{path} holds weights of {relative} ({examples(names, 1)}), whose positions, words or layers are not "
            "BERT's; expected a BERT, a CLIP or the official release's"
        )
    plain = bert.canonical_names(names)
    if bert.is_bert(list(plain)):
        return Found(path, "bert", "BERT", RenamedSource(source, plain), "bert")
    raise UserError(
        f"{path} holds {len(names)} tensors ({examples(names)}), which are neither the official release's nor "
        "CLIP's nor BERT's"
    )
