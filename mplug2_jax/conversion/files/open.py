"""Open weights by what a file holds: safetensors, a PyTorch archive, or a folder of them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from mplug2_jax.conversion.files.sources import FileReader, SafetensorsSource, TensorSource, TensorView
from mplug2_jax.conversion.files.torch_files import TorchSource
from mplug2_jax.errors import UserError

WEIGHT_FILES = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "mp_rank_00_model_states.pt",  # DeepSpeed, next to its optimizer's files
)  # fmt: skip
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def open_source(path: Path) -> TensorSource:
    """Open a file of weights, in the format that its first bytes show, or the weights of a folder.

    Raises:
        UserError: there are no weights, or their format is unknown.
    """
    if path.is_dir():
        files = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        files = files or sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            _check_not_tensorflow(path, [child.name for child in path.iterdir()])
            raise UserError(f"{path} holds no weights; expected one of {', '.join(WEIGHT_FILES)}")
        if len(files) > 1 and files[0].name not in WEIGHT_FILES:
            names = ", ".join(file.name for file in files[:4]) + ", ..." * (len(files) > 4)
            raise UserError(f"{path} holds {len(files)} files of weights ({names}); give the path of one of them")
        path = files[0]
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    if path.suffix == ".ckpt" and not path.is_file():  # what the names of TensorFlow's files begin with
        _check_not_tensorflow(path, [file.name for file in path.parent.glob(f"{path.name}.index")])
    reader = FileReader(path)
    start = reader.read_bytes(0, min(16, reader.size)).tobytes()
    if start[8:9] == b"{":
        return SafetensorsSource(path)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return TorchSource(path)
    _check_not_tensorflow(path, [path.name])
    raise UserError(
        f"{path} is not a checkpoint: it begins with {start[:8]!r}; expected a safetensors file or a PyTorch archive"
    )


def _check_not_tensorflow(path: Path, names: Sequence[str]) -> None:
    """Raise UserError if files with these names are a checkpoint of TensorFlow."""
    if any(re.search(r"\.(index|data-\d+-of-\d+)$", name) for name in names):
        raise UserError(
            f"{path} is a checkpoint of TensorFlow, which we do not read: write its variables, by their own names, to "
            "a safetensors file with TensorFlow, as docs/weights.md shows"
        )


def _open_shards(index: Path) -> TensorSource:
    """Open several files with an index of which tensor is in which, by Hugging Face's convention.

    Raises:
        UserError: the index is damaged, or names files that are missing, in another folder, or lack a tensor.
    """
    try:
        file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(file_of.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is not an index of weight files ({error!r}); copy it again") from error
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index} names {file!r}; expected files in its own folder")
    shards = {file: open_source(index.parent / file) for file in files}
    stored = {(file, name): shard for file, shard in shards.items() for name in shard.names()}
    for name, file in file_of.items():
        if (file, name) not in stored:
            raise UserError(f"{index} says that {name} is in {file}, which lacks it; copy the files again")
    return TensorView({name: (shard, name) for (file, name), shard in stored.items() if file_of.get(name) == file})
