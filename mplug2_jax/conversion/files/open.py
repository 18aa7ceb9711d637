"""Open weights by what a file holds: safetensors, a PyTorch archive, or a folder of them."""

from pathlib import Path

from mplug2_jax.conversion.files.sources import FileReader, SafetensorsSource, ShardedSource, TensorSource
from mplug2_jax.conversion.files.torch_files import TorchSource
from mplug2_jax.errors import UserError

WEIGHT_FILES = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def open_source(path: Path) -> TensorSource:
    """Open a file of weights, in the format that its first bytes show, or the weights of a folder.

    Raises:
        UserError: there are no weights, or their format is unknown.
    """
    if path.is_dir():
        files = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        files = files or sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise UserError(f"{path} holds no weights; expected one of {', '.join(WEIGHT_FILES)}")
        if len(files) > 1 and files[0].name not in WEIGHT_FILES:
            names = ", ".join(file.name for file in files[:4]) + ", ..." * (len(files) > 4)
            raise UserError(f"{path} holds {len(files)} files of weights ({names}); give the path of one of them")
        path = files[0]
    if path.name.endswith(".index.json"):
        return ShardedSource(path, open_source)
    reader = FileReader(path)
    start = reader.read_bytes(0, min(16, reader.size)).tobytes()
    if start[8:9] == b"{":
        return SafetensorsSource(path)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return TorchSource(path)
    raise UserError(
        f"{path} is not a checkpoint: it begins with {start[:8]!r}; expected a safetensors file or a PyTorch archive"
    )
