"""jaxtyping's annotations of arrays; where it is not installed, as in an exported folder, arrays of any shape."""

from typing import Any

try:
    from jaxtyping import Bool, Float, Float32, Int, Int16, UInt8
except ModuleNotFoundError:

    class _Array:
        def __class_getitem__(cls, parameters: tuple[Any, str]) -> Any:
            return parameters[0]

    Bool = Float = Float32 = Int = Int16 = UInt8 = _Array  # type: ignore[assignment]

__all__ = ["Bool", "Float", "Float32", "Int", "Int16", "UInt8"]
