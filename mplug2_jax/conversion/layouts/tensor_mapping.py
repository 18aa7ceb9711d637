"""One tensor of another project mapped to a place in our parameter tree, with the transform between the two."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from mplug2_jax.conversion.files.sources import HostArray
from mplug2_jax.model.mplug2 import Params

ParamPath = tuple[str, ...]
Transform = Literal["identity", "linear", "patch", "pointwise", "depthwise"]
MappingsByName = dict[str, list["TensorMapping"]]  # stored name -> the parameters that it fills


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """A tensor and the parameter that it fills: ``path``, at ``layer`` of a stack of layers.

    ``qkv_index`` selects the query, key or value of a fused projection.
    """

    name: str
    path: ParamPath
    layer: int | None = None
    transform: Transform = "linear"
    qkv_index: int | None = None

    def to_param(self, tensor: HostArray) -> HostArray:
        """Transform their tensor to our layout."""
        if self.qkv_index is not None:
            tensor = np.split(tensor, 3)[self.qkv_index]
        match self.transform:
            case "linear":
                return tensor.T
            case "patch":  # [w, color, (dt,) dy, dx] -> rows (dt, dy, dx, color)
                if tensor.ndim == 4:
                    tensor = tensor[:, :, None]
                return tensor.transpose(2, 3, 4, 1, 0).reshape(-1, tensor.shape[0])
            case "pointwise":
                return tensor.reshape(tensor.shape[:2]).T
            case "depthwise":  # [c, 1, 3, 1, 1] -> [3, c]
                return tensor.reshape(tensor.shape[0], -1).T
        return tensor

    def to_tensor(self, param: HostArray, shape: tuple[int, ...]) -> HostArray:
        """Transform our parameter to their layout; ``shape`` is their tensor's (a third of a fused projection's)."""
        if self.transform == "patch":
            tubelet_size, side = (1 if len(shape) == 4 else shape[2]), shape[-1]
            param = param.reshape(tubelet_size, side, side, 3, shape[0]).transpose(4, 3, 0, 1, 2)
        elif self.transform != "identity":
            param = param.T
        return param.reshape(shape)


def map_linear(
    name: str, path: ParamPath, layer: int | None = None, transform: Transform = "linear"
) -> Iterator[TensorMapping]:
    """Map a linear layer with a bias."""
    yield TensorMapping(f"{name}.weight", (*path, "kernel"), layer, transform)
    yield TensorMapping(f"{name}.bias", (*path, "bias"), layer, "identity")


def map_norm(name: str, path: ParamPath, layer: int | None = None) -> Iterator[TensorMapping]:
    """Map a layer normalization."""
    yield TensorMapping(f"{name}.weight", (*path, "scale"), layer, "identity")
    yield TensorMapping(f"{name}.bias", (*path, "bias"), layer, "identity")


def copy_into(target: HostArray, value: HostArray) -> None:
    """Copy ``value`` to ``target``; transposed matrices in strips of a cache line, four times faster than numpy."""
    if value.ndim == 2 and value.strides[0] < value.strides[1] and min(value.shape) > 16:
        for i in range(0, value.shape[1], 16):
            target[:, i : i + 16] = value[:, i : i + 16]
    else:
        target[...] = value


def group_by_name(mappings: Iterable[TensorMapping]) -> MappingsByName:
    """Group mappings by the name of their tensor."""
    groups: MappingsByName = {}
    for mapping in mappings:
        groups.setdefault(mapping.name, []).append(mapping)
    return groups


def get_leaf(tree: Params, path: ParamPath) -> Any:
    """Return the leaf at a path of a nested dict."""
    node: Any = tree
    for key in path:
        node = node[key]
    return node


def param_shape(shapes: Params, mapping: TensorMapping) -> tuple[int, ...]:
    """Return the shape that a mapping fills: one layer's, in a stack of layers."""
    shape = tuple(get_leaf(shapes, mapping.path).shape)
    return shape if mapping.layer is None else shape[1:]


def get_param(tree: Params, mapping: TensorMapping) -> HostArray:
    """Return the parameter of a mapping from a tree shaped like the parameters, in our layout."""
    leaf = get_leaf(tree, mapping.path)
    return np.asarray(leaf if mapping.layer is None else leaf[mapping.layer])
