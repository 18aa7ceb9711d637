"""Files of named tensors, read one at a time and never executed."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from mplug2_jax.conversion.official import HostArray
from mplug2_jax.errors import UserError


class SafetensorsSource:
    """A safetensors file as a :class:`~mplug2_jax.conversion.official.TensorSource`.

    Raises:
        UserError: the file is missing, truncated, or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"weights file {path} does not exist")
        self.path = path
        try:
            self._file = safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise UserError(f"{path} is truncated or not a safetensors file ({error})") from error

    def names(self) -> list[str]:
        """All names, in the file's order."""
        return list(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it."""
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, name: str) -> HostArray:
        """One tensor."""
        return np.asarray(self._file.get_tensor(name))
