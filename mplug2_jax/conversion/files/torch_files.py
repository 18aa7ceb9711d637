"""PyTorch's own files without PyTorch: state dicts, old and new, and TorchScript archives; nothing in them is executed.

A pickle names the functions that rebuild it. Here only those of plain tensors are known, and what lies beside them in
training checkpoints: no more than ``torch.load(weights_only=True)`` lets through, of its own accord or with
``argparse.Namespace`` among its ``safe_globals``. All of them are our own inert ones; any other name stops the reading,
so that a file with code in it is refused before any of it runs.
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
_MAX_PICKLE = 2**28  # bytes; names and shapes of 100,000 tensors take a tenth of it


class _Storage(NamedTuple):
    """A flat run of elements in the file."""

    dtype: np.dtype[Any]
    key: str
    elements: int


class _Tensor(NamedTuple):
    """A strided view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(Exception):
    """A pickle that asks for more than tensors."""


class _Inert:
    """Something beside the tensors, of which nothing is kept."""

    def __init__(self, *_arguments: Any) -> None: ...

    def __setstate__(self, _state: Any) -> None: ...


class _Object:
    """A module of a TorchScript archive: its attributes, none of its code."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = dict(state) if isinstance(state, dict) else {}


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_rest: Any) -> _Tensor:
    whole = [offset, *shape, *strides]
    if not isinstance(storage, _Storage) or not all(isinstance(n, int) and 0 <= n < 2**48 for n in whole):
        raise _Refused("a tensor whose description makes no sense")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if all(shape) else offset - 1
    if last >= storage.elements:
        raise _Refused(f"a tensor that reaches to element {last} of {storage.elements}")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(tensor: Any, *_rest: Any) -> Any:
    return tensor


def _typed(rebuild: Any, _kind: Any, arguments: Any, *_rest: Any) -> Any:
    """A tensor with attributes of its own, without them."""
    if rebuild not in (_tensor, _parameter):
        raise _Refused("a tensor of a kind of its own")
    return rebuild(*arguments)


def _plain(*arguments: Any) -> Any:
    return arguments[0] if arguments else None


_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "complex32", "complex64", "complex128", "int64", "int32", "int16",
    "int8", "uint8", "uint16", "uint32", "uint64", "bool", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
    "float8_e5m2fnuz",
)  # fmt: skip
_KNOWN: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "Counter"): _Inert,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _typed,
    ("torch", "Tensor"): _Inert,
    ("torch.nn.parameter", "Parameter"): _Inert,
    ("torch", "Size"): tuple,
    ("torch", "device"): _plain,
    ("_codecs", "encode"): _Inert,  # how bytes are kept
    **{("builtins", name): _Inert for name in ("bytearray", "complex", "set")},
    ("argparse", "Namespace"): _Inert,
    **{("torch", name): name for name in _DTYPES},
    ("torch.jit._pickle", "build_intlist"): _plain,
    ("torch.jit._pickle", "build_doublelist"): _plain,
    ("torch.jit._pickle", "build_boollist"): _plain,
    ("torch.jit._pickle", "build_tensorlist"): _plain,
    ("torch.jit._pickle", "restore_type_tag"): _plain,
}


_TOPS = ("model", "module", "state_dict", "model_state_dict")
"""Where training checkpoints keep the state dict."""


class _Unpickler(pickle.Unpickler):
    """Knows tensors, containers and TorchScript's modules; refuses every other name."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)  # __builtin__, as Python 2 calls builtins
        if module.startswith("__torch__"):
            return _Object
        if (module, name) not in _KNOWN:
            raise _Refused(f"{module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, saved: Any) -> _Storage:
        kind, dtype, key, _device, elements = saved[:5]
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(elements, int) or elements < 0:
            raise _Refused("a storage whose description makes no sense")
        return self.storages.setdefault(str(key), _Storage(dtype, str(key), elements))


class TorchSource:
    """The tensors of a ``.pth``, ``.pt`` or ``.bin`` file: a state dict, alone or where training keeps it.

    Raises:
        UserError: the file is missing, truncated, no such file, or holds more than tensors.
    """

    def __init__(self, path: Path) -> None:
        self._reader = FileReader(path)
        self._path = path
        self._offsets: dict[str, tuple[int, int]] = {}  # storage -> (begin, bytes) in the file
        try:
            archive = self._reader.bytes_at(0, min(4, self._reader.size)).tobytes() == b"PK\x03\x04"
            tree = self._open_archive() if archive else self._open_legacy()
        except _Refused as error:
            raise UserError(
                f"{path} is refused: its pickle asks for {error}, which is not a plain tensor and could be code; in "
                "PyTorch, save the state dict alone"
            ) from error
        except UserError:
            raise
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise UserError(f"{path} is truncated or not a PyTorch file ({_short(error)})") from error
        self._tensors = _state_dict(tree, path)
        if not self._tensors:
            raise UserError(
                f"{path} holds no tensors by name; expected a state dict, alone or under {' or '.join(_TOPS)}"
            )
        self._check_storages()

    def names(self) -> list[str]:
        """All names, in the state dict's order."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape and type of one tensor, without reading it."""
        tensor = self._tensors[name]
        return TensorInfo(tensor.shape, tensor.storage.dtype)

    def read(self, name: str) -> HostArray:
        """One tensor; only the bytes that it spans are read."""
        storage, offset, shape, strides = self._tensors[name]
        if not all(shape):
            return np.zeros(shape, storage.dtype)
        size = storage.dtype.itemsize
        spanned = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1
        begin, _ = self._offsets[storage.key]
        flat = self._reader.bytes_at(begin + offset * size, spanned * size).view(storage.dtype)
        view = np.lib.stride_tricks.as_strided(flat, shape, [step * size for step in strides], writeable=False)
        return np.ascontiguousarray(view).reshape(shape)

    def _open_archive(self) -> Any:
        with zipfile.ZipFile(self._path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            (pickled,) = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
            root = pickled.removesuffix("data.pkl")
            if entries[pickled].file_size > _MAX_PICKLE:
                raise ValueError(f"its pickle has {entries[pickled].file_size:,} bytes")
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
            if order != b"little":
                raise ValueError(f"its byte order is {order!r}, known is little")
            for name, entry in entries.items():
                if name.startswith(f"{root}data/"):
                    self._offsets[name.removeprefix(f"{root}data/")] = self._place(entry)
            return _Unpickler(io.BytesIO(archive.read(pickled))).load()

    def _place(self, entry: zipfile.ZipInfo) -> tuple[int, int]:
        """Where an entry's bytes are: behind a local header, whose length the central directory does not know."""
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{entry.filename} is compressed, which PyTorch never does")
        header = self._reader.bytes_at(entry.header_offset, 30).tobytes()
        name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        return entry.header_offset + 30 + name + extra, entry.file_size

    def _open_legacy(self) -> Any:
        """Files from before PyTorch 1.6: pickles one after another, then every storage with its length before it."""
        with self._path.open("rb") as file:
            if _Unpickler(file).load() != _LEGACY_MAGIC:
                raise ValueError("its first bytes are not PyTorch's")
            for _ in range(2):  # protocol version, system information
                _Unpickler(file).load()
            unpickler = _Unpickler(file)
            tree, keys = unpickler.load(), _Unpickler(file).load()
            position = file.tell()
            for key in map(str, keys):
                count = int.from_bytes(self._reader.bytes_at(position, 8).tobytes(), "little")
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
    """The named tensors of what was saved; other things in it (optimisers, settings) are passed over.

    Raises:
        UserError: several state dicts under names that do not say which is the model's.
    """
    if isinstance(tree, _Object):
        return dict(_walk(tree, ""))
    if not isinstance(tree, dict):
        return {}
    if depth:
        known = (_state_dict(tree[top], path, depth - 1) for top in _TOPS if isinstance(tree.get(top), dict))
        if found := next(filter(None, known), None):
            return found
    named = {name: value for name, value in tree.items() if isinstance(name, str) and isinstance(value, _Tensor)}
    if named or not depth:
        return named
    others = {name: found for name, value in tree.items() if (found := _state_dict(value, path, 0))}
    if len(others) > 1:
        raise UserError(f"{path} holds tensors under {', '.join(map(str, others))}; save the model's state dict alone")
    return next(iter(others.values()), {})


def _walk(module: _Object, prefix: str) -> list[tuple[str, _Tensor]]:
    found = []
    for name, value in getattr(module, "attributes", {}).items():
        if isinstance(value, _Tensor):
            found.append((f"{prefix}{name}", value))
        elif isinstance(value, _Object):
            found += _walk(value, f"{prefix}{name}.")
    return found


def _short(error: Exception) -> str:
    return (str(error) or type(error).__name__).split("\n")[0][:160]


class TorchWriter:
    """Writes a state dict that ``torch.load(weights_only=True)`` opens, a tensor at a time, in any order."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = dict(tensors)
        self._keys = {name: str(i) for i, name in enumerate(tensors)}
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._lock = threading.Lock()

    def write(self, name: str, value: HostArray) -> None:
        """Appends the bytes of one tensor. Safe to call from several threads."""
        entry = zipfile.ZipInfo(f"archive/data/{self._keys[name]}")
        with self._lock, self._archive.open(entry, "w", force_zip64=True) as file:
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

    def close(self) -> None:
        """Writes names and shapes, and closes."""
        self._archive.writestr("archive/data.pkl", self._pickle())
        self._archive.writestr("archive/byteorder", "little")
        self._archive.writestr("archive/version", "3\n")
        self._archive.close()

    def _pickle(self) -> bytes:
        """The state dict's pickle, written by hand: the functions that it names need not be importable here."""
        out = bytearray(b"\x80\x02ccollections\nOrderedDict\n)R(")
        for name, (shape, dtype) in self._tensors.items():
            strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
            out += _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n((" + _text("storage")
            out += b"ctorch\n" + _NAMES[dtype].encode() + b"\n" + _text(self._keys[name]) + _text("cpu")
            out += _number(math.prod(shape)) + b"tQ" + _number(0) + _numbers(shape) + _numbers(strides)
            out += b"\x89ccollections\nOrderedDict\n)RtR"
        return bytes(out + b"u.")


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def _number(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little") if value < 2**31 else b"\x8a\x08" + value.to_bytes(8, "little")


def _numbers(values: Any) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"
