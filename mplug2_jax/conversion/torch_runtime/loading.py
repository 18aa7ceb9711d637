"""Load checkpoints of the release's layout: files of named tensors, and patterns of the names that are ignored.

Loading is strict: a tensor that no module holds must match a pattern below, or nothing is loaded.
"""

import argparse
import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...errors import UserError
from .config import Config

# One parameter each under two names: the copy, and the original.
TIED: Mapping[str, str] = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}
STATE_DICT_KEYS = ("model", "module", "state_dict", "model_state_dict")
"""Keys of the state dict in training checkpoints."""
_TEACHER = re.compile(r"^(\w+)_m(?=\.)")  # the release appends _m to the module's name
NamePatterns = list[tuple[re.Pattern[str], str]]  # patterns of whole names, and the reason why they are ignored


def ignored_patterns(config: Config, *, text: bool) -> NamePatterns:
    """Return patterns of the tensors that the model ignores, with reasons; the first that matches a name explains it.

    ``text``: whether the model encodes text, and so has fusion and a text encoder below the universal layers.
    """
    joint = (config.fusion_start + j for j in config.joint_attention_layers)
    patterns = [
        (r".*\.position_ids", "buffer: the positions 0, 1, 2, ..."),
        (r"visual_encoder\.visual\.proj", "CLIP's projection, never called"),
        (r"visual_encoder\.(?!visual\.).*", "CLIP's text tower, never called"),
        (r".*\.(intermediate|output)_vision\..*", "separate vision MLP, commented out in the release"),
        (r"text_decoder\..*\.latents", "latents of the layer class, never read in the decoder"),
        (r"fusion_encoder\.embeddings\..*", "fusion starts from encoded text, never from ids"),
        (_layers("fusion_encoder", range(config.fusion_start)), "fusion layer below the first in use"),
        (
            _layers("fusion_encoder", joint, r"crossattention\."),
            "cross attention of a fusion layer that mixes instead",
        ),
    ]
    if not text:
        patterns += [
            (r"fusion_encoder\..*", "no fusion in this model"),
            (r"text_encoder\.embeddings\..*", "no text in this model"),
            (_layers("text_encoder", range(config.text_layers)), "no text in this model"),
        ]
    return [(re.compile(pattern), reason) for pattern, reason in patterns]


def _layers(tower: str, indices: Iterable[int], part: str = "") -> str:
    """Return the pattern of a part of some layers; without indices it matches nothing."""
    return rf"{tower}\.encoder\.layer\.({'|'.join(map(str, indices)) or '(?!)'})\.{part}.*"


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Read all tensors of a file by name: safetensors, or a file of ``torch.save``; runs no code in it.

    A checkpoint's tensors may be under one of :data:`STATE_DICT_KEYS`, and a wrapper's prefix is removed.

    Raises:
        UserError: the file is missing, damaged, of another format, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    if path.name.endswith(".index.json"):
        tensors = _read_sharded(path)
    else:
        tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
    prefix = os.path.commonprefix(list(tensors)).rpartition(".")[0]  # noqa: RUF071  these are not paths
    if prefix and len(tensors) > 1:
        tensors = {name.removeprefix(f"{prefix}."): tensors[name] for name in tensors}
    return tensors


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)  # memory-mapped
    except FileNotFoundError:
        raise UserError(f"weights file {path} does not exist") from None
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error})") from error


def _read_sharded(index: Path) -> Mapping[str, Tensor]:
    try:
        file_of: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(file_of.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of weight files ({error!r}); copy it again") from error
    if any(Path(str(name)).name != name for name in names):
        raise UserError(f"{index} names files of another folder; expected files in its own")
    shards = {name: _read_safetensors(index.parent / name) for name in names}
    if missing := [name for name, file in file_of.items() if name not in shards[file]]:
        raise UserError(f"{index}: {missing[0]} is not in {file_of[missing[0]]}; copy the files again")
    return {name: shards[file][name] for name, file in file_of.items()}


def _read_pickled(path: Path) -> Mapping[str, Tensor]:
    try:
        # Files of before PyTorch 1.6 are not zip archives and cannot be memory-mapped.
        with torch.serialization.safe_globals([argparse.Namespace]):  # a run's settings, without code
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # zipfile, pickle and torch each raise their own for a damaged file
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is damaged or holds more than tensors and plain values ({reason})") from error
    for key in STATE_DICT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"{path} holds no state dict: expected named tensors, bare or under {' or '.join(STATE_DICT_KEYS)}"
        )
    return content


def choose_weights(folder: Path) -> Path:
    """Return the only weights file of a folder, or the index of several.

    Raises:
        UserError: there is no weights file, or more than one.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return indices[0]
    files = sorted(path for pattern in ("*.safetensors", "*.pth") for path in folder.glob(pattern))
    if len(files) != 1:
        names = ", ".join(path.name for path in files)
        listed = f"{len(files)} weights files ({names})" if files else "no weights file"
        raise UserError(f"{folder} holds {listed}; expected one .safetensors or .pth file; give the path of a file")
    return files[0]


def select_state(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], ignored: NamePatterns, *, teacher: bool,
    where: Path | str,
) -> tuple[dict[str, Tensor], dict[str, str]]:  # fmt: skip
    """Return the tensors of a checkpoint for a model with the ``expected`` state, and why others are dropped, by name.

    With ``teacher``, selects the teacher's copy of every tensor.

    Raises:
        UserError: tensors are unexpected, missing, of a wrong shape or dtype, or tied but different; nothing is loaded.
    """
    state: dict[str, Tensor] = {}
    dropped: dict[str, str] = {}
    unexpected: list[str] = []
    for stored in tensors:
        name, is_teacher = _TEACHER.subn(r"\1", stored)
        if name not in expected:
            reason = next((reason for pattern, reason in ignored if pattern.fullmatch(name)), None)
            if reason is None:
                unexpected.append(stored)
            else:
                dropped[stored] = reason
        elif bool(is_teacher) != teacher:
            dropped[stored] = "the student's copy" if teacher else "the teacher's copy"
        else:
            state[name] = tensors[stored]
    _complete_ties(state, where)
    missing = [name.replace(".", "_m.", 1) if teacher else name for name in expected if name not in state]
    wrong = [
        f"{name} {str(x.dtype).removeprefix('torch.')} {list(x.shape)} instead of {list(expected[name].shape)}"
        for name, x in state.items()
        if x.shape != expected[name].shape or not x.is_floating_point()
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape or dtype": wrong}
    if listed := [f"{len(names)} {problem} ({_first_few(names)})" for problem, names in problems.items() if names]:
        raise UserError(f"{where} does not match the model: {', '.join(listed)}; nothing was loaded. Check the sizes")
    return state, dropped


def _complete_ties(state: dict[str, Tensor], where: Path | str) -> None:
    """Set both names of a tied parameter, if the checkpoint has one of them or two equal tensors."""
    for pair in TIED.items():
        present = [name for name in pair if name in state]
        if len(present) == 2 and not torch.equal(state[pair[0]], state[pair[1]]):
            raise UserError(f"{where}: {pair[0]} differs from {pair[1]}, but the model has one parameter for both")
        if present:
            state.update(dict.fromkeys(pair, state[present[0]]))


def _first_few(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f", and {len(names) - limit} more" if len(names) > limit else "")
