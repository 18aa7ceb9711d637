"""Read and write PyTorch's files without PyTorch, and without running their code: state dicts, TorchScript archives.

A pickle names the functions that rebuild it. The allowlist has those of plain tensors and of what training checkpoints
hold besides: no more than ``torch.load(weights_only=True)`` allows by default or with ``argparse.Namespace`` in its
``safe_globals``. Each maps to an inert function of ours; any other name is an error, so that a file with code in it is
rejected before any of it runs.
"""

import _compat_pickle
import collections
import io
import math
import pickle
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from data_pipelines.errors import StorageUnavailableError
from mplug2_jax.conversion.files.sources import FileReader, HostArray, TensorInfo
from mplug2_jax.errors import UserError

_STORAGES: Mapping[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype(np.float64), "FloatStorage": np.dtype(np.float32), "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16), "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32), "ShortStorage": np.dtype(np.int16), "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8), "BoolStorage": np.dtype(np.bool_),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _STORAGES.items()}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_PICKLE = 2**28  # bytes; names and shapes of 100,000 tensors take a tenth


class _Storage(NamedTuple):
    """A flat array in the file."""

    dtype: np.dtype[Any]
    key: str
    elements: int


class _Tensor(NamedTuple):
    """A strided view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _ForbiddenPickleError(Exception):
    """A pickle that names something besides tensors."""


class _Discarded:
    """Stands for anything but tensors; keeps nothing."""

    def __init__(self, *_arguments: Any) -> None: ...

    def __setstate__(self, _state: Any) -> None: ...


class _ScriptModule:
    """A module of a TorchScript archive: its attributes, none of its code."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = dict(state) if isinstance(state, dict) else {}


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_ignored: Any) -> _Tensor:
    numbers = [offset, *shape, *strides]
    if not isinstance(storage, _Storage) or not all(isinstance(n, int) and 0 <= n < 2**48 for n in numbers):
        raise _ForbiddenPickleError("a tensor with invalid metadata")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if all(shape) else offset - 1
    if last >= storage.elements:
        raise _ForbiddenPickleError(f"a tensor that ends at element {last} of {storage.elements}")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: Any, *_ignored: Any) -> Any:
    return tensor


def _rebuild_from_type(rebuild: Any, _type: Any, arguments: Any, *_ignored: Any) -> Any:
    """Rebuild a tensor without its extra attributes."""
    if rebuild not in (_rebuild_tensor, _rebuild_parameter):
        raise _ForbiddenPickleError("a subclass of tensor")
    return rebuild(*arguments)


def _first_argument(*arguments: Any) -> Any:
    return arguments[0] if arguments else None


_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "complex32", "complex64", "complex128", "int64", "int32", "int16",
    "int8", "uint8", "uint16", "uint32", "uint64", "bool", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
    "float8_e5m2fnuz",
)  # fmt: skip
_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "Counter"): _Discarded,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,  # before PyTorch 0.4
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("torch", "Tensor"): _Discarded,
    ("torch.nn.parameter", "Parameter"): _Discarded,
    ("torch", "Size"): tuple,
    ("torch", "device"): _first_argument,
    ("_codecs", "encode"): _Discarded,  # how bytes are stored
    **{("builtins", name): _Discarded for name in ("bytearray", "complex", "set")},
    ("argparse", "Namespace"): _Discarded,
    **{("torch", name): name for name in _DTYPES},
    **{("torch.jit._pickle", f"build_{kind}list"): _first_argument for kind in ("int", "double", "bool", "tensor")},
    ("torch.jit._pickle", "restore_type_tag"): _first_argument,
}


_STATE_DICT_KEYS = ("model", "module", "state_dict", "model_state_dict")
"""Keys of the state dict in training checkpoints."""


class _Unpickler(pickle.Unpickler):
    """Allows tensors, containers and TorchScript's modules; rejects every other name."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)  # __builtin__, as Python 2 calls builtins
        if module.startswith("__torch__"):
            return _ScriptModule
        if (module, name) not in _ALLOWED:
            raise _ForbiddenPickleError(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _device, elements, *view = pid
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(elements, int) or elements < 0:
            raise _ForbiddenPickleError("a storage with invalid metadata")
        if any(view):  # the oldest files; a view begins at an offset into another storage
            raise _ForbiddenPickleError("a view of another storage")
        return self.storages.setdefault(str(key), _Storage(dtype, str(key), elements))


class TorchSource:
    """The tensors of a ``.pth``, ``.pt`` or ``.bin`` file: a state dict, alone or in a training checkpoint.

    Raises:
        UserError: the file is missing, truncated, of another format, or its pickle could run code.
    """

    def __init__(self, path: Path) -> None:
        self._reader = FileReader(path)
        self._path = path
        self._offsets: dict[str, tuple[int, int]] = {}  # storage -> (begin, bytes) in the file
        try:
            archive = self._reader.read_bytes(0, min(4, self._reader.size)).tobytes() == b"PK\x03\x04"
            tree = self._open_archive() if archive else self._open_legacy()
        except _ForbiddenPickleError as error:
            raise UserError(
                f"{path} is rejected: its pickle contains {error}, which is not a plain tensor and could run code; "
                "save the state dict alone in PyTorch"
            ) from error
        except (UserError, StorageUnavailableError, PermissionError):
            raise
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise UserError(f"{path} is truncated or not a PyTorch file ({_first_line(error)})") from error
        self._tensors = _state_dict(tree, path)
        if not self._tensors:
            raise UserError(
                f"{path} holds no named tensors; expected a state dict, alone or under {' or '.join(_STATE_DICT_KEYS)}"
            )
        self._check_storages()

    def names(self) -> list[str]:
        """Return all names, in the state dict's order."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of one tensor, without reading it."""
        tensor = self._tensors[name]
        return TensorInfo(tensor.shape, tensor.storage.dtype)

    def read(self, name: str) -> HostArray:
        """Read one tensor; reads only the bytes that it spans."""
        storage, offset, shape, strides = self._tensors[name]
        if not all(shape):
            return np.zeros(shape, storage.dtype)
        size = storage.dtype.itemsize
        span = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1
        begin, _ = self._offsets[storage.key]
        flat = self._reader.read_bytes(begin + offset * size, span * size).view(storage.dtype)
        view = np.lib.stride_tricks.as_strided(flat, shape, [step * size for step in strides], writeable=False)
        return np.ascontiguousarray(view).reshape(shape)

    def _open_archive(self) -> Any:
        with self._path.open("rb") as opened, zipfile.ZipFile(opened) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            (pickled,) = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
            root = pickled.removesuffix("data.pkl")
            if entries[pickled].file_size > _MAX_PICKLE:
                raise ValueError(f"its pickle has {entries[pickled].file_size:,} bytes")
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
            if order != b"little":
                raise ValueError(f"its byte order is {order!r}, expected little")
            self._locate({
                name.removeprefix(f"{root}data/"): entry
                for name, entry in entries.items()
                if name.startswith(f"{root}data/")
            })  # fmt: skip
            return _Unpickler(io.BytesIO(archive.read(pickled))).load()

    def _locate(self, storages: Mapping[str, zipfile.ZipInfo]) -> None:
        """Find the bytes of storages: they follow a local header of variable length."""
        for entry in storages.values():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed, which PyTorch never does")
        headers = self._reader.read_many([entry.header_offset for entry in storages.values()], 30)
        for (key, entry), header in zip(storages.items(), headers, strict=True):
            name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
            self._offsets[key] = (entry.header_offset + 30 + name + extra, entry.file_size)

    def _open_legacy(self) -> Any:
        """Read a file of before PyTorch 1.6: a sequence of pickles, then every storage after its length."""
        with self._path.open("rb") as file:
            if _Unpickler(file).load() != _LEGACY_MAGIC:
                raise ValueError("its first bytes are not PyTorch's")
            for _ in range(2):  # protocol version, system information
                _Unpickler(file).load()
            unpickler = _Unpickler(file)
            tree, keys = unpickler.load(), _Unpickler(file).load()
            position = file.tell()
            for key in map(str, keys):
                count = int.from_bytes(self._reader.read_bytes(position, 8).tobytes(), "little")
                size = count * unpickler.storages[key].dtype.itemsize
                self._offsets[key] = (position + 8, size)
                position += 8 + size
            return tree

    def _check_storages(self) -> None:
        for name, tensor in self._tensors.items():
            storage = tensor.storage
            begin, size = self._offsets.get(storage.key, (0, -1))
            if size < storage.elements * storage.dtype.itemsize or begin + size > self._reader.size:
                raise UserError(f"{self._path} is truncated: the bytes of {name} are missing; copy it again")


def _state_dict(tree: Any, path: Path, depth: int = 3) -> dict[str, _Tensor]:
    """Return the named tensors of what was saved, and skip the optimizer and settings.

    Raises:
        UserError: there are several state dicts, and no name says which is the model's.
    """
    if isinstance(tree, _ScriptModule):
        return dict(_module_tensors(tree, ""))
    if not isinstance(tree, dict):
        return {}
    if depth:
        nested = (
            _state_dict(tree[key], path, depth - 1) for key in _STATE_DICT_KEYS if isinstance(tree.get(key), dict)
        )
        if state := next(filter(None, nested), None):
            return state
    named = {name: value for name, value in tree.items() if isinstance(name, str) and isinstance(value, _Tensor)}
    if named or not depth:
        return named
    states = {name: state for name, value in tree.items() if (state := _state_dict(value, path, 0))}
    if len(states) > 1:
        raise UserError(f"{path} holds tensors under {', '.join(map(str, states))}; save the model's state dict alone")
    return next(iter(states.values()), {})


def _module_tensors(module: _ScriptModule, prefix: str) -> list[tuple[str, _Tensor]]:
    tensors = []
    for name, value in getattr(module, "attributes", {}).items():
        if isinstance(value, _Tensor):
            tensors.append((f"{prefix}{name}", value))
        elif isinstance(value, _ScriptModule):
            tensors += _module_tensors(value, f"{prefix}{name}.")
    return tensors


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0][:160]


class TorchWriter:
    """A state dict that ``torch.load(weights_only=True)`` opens, written a tensor at a time, in any order."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = dict(tensors)
        self._keys = {name: str(i) for i, name in enumerate(tensors)}
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._lock = threading.Lock()

    def write(self, name: str, value: HostArray) -> None:
        """Append the bytes of one tensor. Thread-safe."""
        entry = zipfile.ZipInfo(f"archive/data/{self._keys[name]}")
        with self._lock, self._archive.open(entry, "w", force_zip64=True) as file:
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Write names and shapes, and close the file."""
        self._archive.writestr("archive/data.pkl", self._pickle())
        self._archive.writestr("archive/byteorder", "little")
        self._archive.writestr("archive/version", "3\n")
        self._archive.close()

    def _pickle(self) -> bytes:
        """Return the state dict's pickle, written by hand: the functions that it names need not be importable here."""
        out = bytearray(b"\x80\x02ccollections\nOrderedDict\n)R(")
        for name, (shape, dtype) in self._tensors.items():
            strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
            out += _pickle_str(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + _pickle_str("storage")
            out += b"ctorch\n" + _NAMES[dtype].encode() + b"\n" + _pickle_str(self._keys[name]) + _pickle_str("cpu")
            out += _pickle_int(math.prod(shape)) + b"tQ" + _pickle_int(0) + _pickle_ints(shape) + _pickle_ints(strides)
            out += b"\x89ccollections\nOrderedDict\n)RtR"
        return bytes(out + b"u.")


def _pickle_str(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _pickle_int(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little") if value < 2**31 else b"\x8a\x08" + value.to_bytes(8, "little")


def _pickle_ints(values: Any) -> bytes:
    return b"(" + b"".join(map(_pickle_int, values)) + b"t"
