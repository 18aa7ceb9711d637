"""Checkpoints of the release's layout: files of named tensors, and the names of which nothing is kept.

Loading is strict: a tensor that no module holds must be explained by a rule below, or nothing is loaded.
"""

import argparse
import json
import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mplug2_jax.conversion.torch_runtime.config import Config
from mplug2_jax.errors import UserError

# One parameter each, listed twice: the copy and the name that it is a copy of.
TIED: Mapping[str, str] = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}
STATE_DICT_KEYS = ("model", "module", "state_dict", "model_state_dict")
"""Where training checkpoints keep the state dict."""
_TEACHER = re.compile(r"^(\w+)_m(?=\.)")  # the release appends _m to the module's name
Rules = list[tuple[re.Pattern[str], str]]  # a pattern of whole names, and why nothing reads such a tensor


def ignored_patterns(config: Config, *, text: bool) -> Rules:
    """Which tensors of the release nothing reads, and why; the first rule that matches a whole name explains it.

    ``text``: whether the model encodes text, so that it has a text encoder below the universal layers, and fusion.
    """
    rules = [
        (r".*\.position_ids", "buffer: the positions 0, 1, 2, ..."),
        (r"visual_encoder\.visual\.proj", "CLIP's projection, never called"),
        (r"visual_encoder\.(?!visual\.).*", "CLIP's text tower, never called"),
        (r".*\.(intermediate|output)_vision\..*", "separate vision MLP, commented out in the release"),
        (r"text_decoder\..*\.latents", "latents made by the layer class, never read in the decoder"),
        (r"fusion_encoder\.embeddings\..*", "fusion starts from encoded text, never from ids"),
        (_layers("fusion_encoder", range(config.fusion_start)), "fusion layer below the first in use"),
        (
            _layers("fusion_encoder", (config.fusion_start + j for j in config.mixing_layers), r"crossattention\."),
            "cross attention of a fusion layer that mixes instead",
        ),
    ]
    if not text:
        rules += [
            (r"fusion_encoder\..*", "no fusion in this model"),
            (r"text_encoder\.embeddings\..*", "no text in this model"),
            (_layers("text_encoder", range(config.text_layers)), "no text in this model"),
        ]
    return [(re.compile(pattern), why) for pattern, why in rules]


def _layers(tower: str, indices: Iterable[int], part: str = "") -> str:
    """The pattern of a part of some layers; of none where there are no indices."""
    return rf"{tower}\.encoder\.layer\.({'|'.join(map(str, indices)) or '(?!)'})\.{part}.*"


class SafetensorsFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="pt")
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """All tensors of a file, by name: safetensors, or what ``torch.save`` wrote of tensors alone; no code is run.

    A checkpoint's tensors may lie under one of :data:`STATE_DICT_KEYS`, and a wrapper's prefix is taken off.

    Raises:
        UserError: the file is missing, damaged, of another kind, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    if path.name.endswith(".index.json"):
        tensors: Mapping[str, Tensor] = ShardedFiles(path)
    else:
        tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    wrapper = os.path.commonprefix(list(tensors)).rpartition(".")[0]  # noqa: RUF071  they are no paths
    if wrapper and len(tensors) > 1:
        tensors = {name.removeprefix(f"{wrapper}."): tensors[name] for name in tensors}
    return tensors


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    try:
        return SafetensorsFile(path)
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error})") from error


def _read_pickled(path: Path) -> Mapping[str, Tensor]:
    try:
        # Files of before PyTorch 1.6 are no zip archives and cannot be mapped into memory.
        with torch.serialization.safe_globals([argparse.Namespace]):  # a run's settings, which hold nothing to call
            found: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # zipfile, pickle and torch each raise their own for a damaged file
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is damaged or holds more than tensors and plain values ({reason})") from error
    for key in STATE_DICT_KEYS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(
            f"{path} holds no state dict: expected named tensors, bare or under {' or '.join(STATE_DICT_KEYS)}"
        )
    return found


class ShardedFiles(Mapping[str, Tensor]):
    """The tensors of several safetensors files with an index, by Hugging Face's convention.

    Raises:
        UserError: an index that is damaged, or leads elsewhere, or to files that are missing or damaged.
    """

    def __init__(self, index: Path) -> None:
        try:
            self._where: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = set(self._where.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is no index of weight files: {error!r}") from error
        if any(Path(str(name)).name != name for name in names):
            raise UserError(f"{index} names files that are not beside it")
        self._files = {name: _read_safetensors(index.parent / name) for name in names}

    def __getitem__(self, name: str) -> Tensor:
        return self._files[self._where[name]][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def choose_weights(folder: Path) -> Path:
    """The one weights file of a folder, or the index of its several.

    Raises:
        UserError: no weights file, or more than one.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return indices[0]
    found = sorted(path for pattern in ("*.safetensors", "*.pth") for path in folder.glob(pattern))
    if len(found) != 1:
        listed = (
            f"{len(found)} weights files ({', '.join(path.name for path in found)})" if found else "no weights file"
        )
        raise UserError(f"{folder} holds {listed}; expected one .safetensors or .pth file, or name the file itself")
    return found[0]


def select_state(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    rules: Rules,
    *,
    teacher: bool,
    where: Path | str,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a model with the ``expected`` state takes of a checkpoint, and why the rest is dropped, by stored name.

    With ``teacher`` the teacher's copy of every tensor is taken.

    Raises:
        UserError: tensors that nothing explains, missing ones, others of a wrong shape or kind, or tied ones that
            differ; nothing is loaded then.
    """
    state: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    unexpected: list[str] = []
    for stored in tensors:
        name, is_teacher = _TEACHER.subn(r"\1", stored)
        if name not in expected:
            why = next((why for pattern, why in rules if pattern.fullmatch(name)), None)
            if why is None:
                unexpected.append(stored)
            else:
                dropped[stored] = why
        elif bool(is_teacher) != teacher:
            dropped[stored] = "the student's copy" if teacher else "the teacher's copy"
        else:
            state[name] = tensors[stored]
    _complete_ties(state, where)
    missing = [name.replace(".", "_m.", 1) if teacher else name for name in expected if name not in state]
    wrong = [
        f"{name} {str(found.dtype).removeprefix('torch.')} {list(found.shape)} instead of {list(expected[name].shape)}"
        for name, found in state.items()
        if found.shape != expected[name].shape or not found.is_floating_point()
    ]
    troubles = {"missing": missing, "unexpected": unexpected, "of another shape or kind": wrong}
    if said := [f"{len(names)} {what} ({_examples(names)})" for what, names in troubles.items() if names]:
        raise UserError(f"{where} does not match the model: {', '.join(said)}; nothing was loaded. Check the sizes")
    return state, dropped


def _complete_ties(state: dict[str, Tensor], where: Path | str) -> None:
    """Both names of a tied parameter are accepted, together if they are equal, or one alone."""
    for pair in TIED.items():
        present = [name for name in pair if name in state]
        if len(present) == 2 and not torch.equal(state[pair[0]], state[pair[1]]):
            raise UserError(f"{where}: {pair[0]} differs from {pair[1]}, but the model has one parameter for both")
        if present:
            state.update(dict.fromkeys(pair, state[present[0]]))


def _examples(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
