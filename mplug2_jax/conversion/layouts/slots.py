"""Places: which tensor of another world stands where in our parameter tree, and in which layout."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from mplug2_jax.conversion.files.sources import HostArray
from mplug2_jax.model.mplug2 import Params

Path = tuple[str, ...]
Layout = Literal["same", "linear", "patch", "pointwise", "depthwise"]
Wanted = dict[str, list["Slot"]]  # stored name -> the places that it fills


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor and a place that it fills: ``path``, at ``layer`` of a stack; ``third`` cuts a fused q, k, v."""

    name: str
    path: Path
    layer: int | None = None
    layout: Layout = "linear"
    third: int | None = None

    def to_ours(self, tensor: HostArray) -> HostArray:
        """Their array in our layout."""
        if self.third is not None:
            tensor = np.split(tensor, 3)[self.third]
        match self.layout:
            case "linear":
                return tensor.T
            case "patch":  # [w, colour, (dt,) dy, dx] -> rows (dt, dy, dx, colour)
                if tensor.ndim == 4:
                    tensor = tensor[:, :, None]
                return tensor.transpose(2, 3, 4, 1, 0).reshape(-1, tensor.shape[0])
            case "pointwise":
                return tensor.reshape(tensor.shape[:2]).T
            case "depthwise":  # [c, 1, 3, 1, 1] -> [3, c]
                return tensor.reshape(tensor.shape[0], -1).T
        return tensor

    def to_theirs(self, value: HostArray, shape: tuple[int, ...]) -> HostArray:
        """Our array in their layout; ``shape`` is their tensor's (of the third, where it is cut)."""
        if self.layout == "patch":
            taken, side = (1 if len(shape) == 4 else shape[2]), shape[-1]
            value = value.reshape(taken, side, side, 3, shape[0]).transpose(4, 3, 0, 1, 2)
        elif self.layout != "same":
            value = value.T
        return value.reshape(shape)


_NORM = {"weight": "scale", "bias": "bias"}


def linear(name: str, path: Path, layer: int | None = None, layout: Layout = "linear") -> Iterator[Slot]:
    """A linear map with a bias."""
    yield Slot(f"{name}.weight", (*path, "kernel"), layer, layout)
    yield Slot(f"{name}.bias", (*path, "bias"), layer, "same")


def norm(name: str, path: Path, layer: int | None = None) -> Iterator[Slot]:
    """A layer normalisation."""
    for theirs, ours in _NORM.items():
        yield Slot(f"{name}.{theirs}", (*path, ours), layer, "same")


def copy_into(target: HostArray, value: HostArray) -> None:
    """``target[...] = value``; transposed matrices in strips of a cache line, four times quicker than numpy alone."""
    if value.ndim == 2 and value.strides[0] < value.strides[1] and min(value.shape) > 16:
        for i in range(0, value.shape[1], 16):
            target[:, i : i + 16] = value[:, i : i + 16]
    else:
        target[...] = value


def by_name(slots: Iterable[Slot]) -> Wanted:
    """Slots by the tensor that fills them."""
    wanted: Wanted = {}
    for slot in slots:
        wanted.setdefault(slot.name, []).append(slot)
    return wanted


def at(tree: Params, path: Path) -> Any:
    """What stands at a path of a nested dict."""
    node: Any = tree
    for key in path:
        node = node[key]
    return node


def shape_at(shapes: Params, slot: Slot) -> tuple[int, ...]:
    """The shape of what a slot fills: of one layer, where it is a layer of a stack."""
    whole = tuple(at(shapes, slot.path).shape)
    return whole if slot.layer is None else whole[1:]


def take(tree: Params, slot: Slot) -> HostArray:
    """What stands in one slot of a tree shaped like the parameters, still in our layout."""
    node = at(tree, slot.path)
    return np.asarray(node if slot.layer is None else node[slot.layer])
