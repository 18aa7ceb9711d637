"""Freezing by part: a frozen parameter gets no gradient, no moments and no weight decay, and never changes."""

from collections.abc import Collection

from flax.traverse_util import flatten_dict, unflatten_dict

from mplug2_jax.model.mplug2 import Params

LORA_KEY = "lora"
"""The key, next to a frozen kernel, of the adapter that is trained in its place: see lora.py."""


def part_name(path: tuple[str, ...]) -> str:
    """Return the part of the model that a parameter belongs to; the temporal units in the vision tower are one.

    The projection from the tower's width to the model's, which no checkpoint of CLIP or BERT provides, belongs to none:
    it is always trained.
    """
    return "temporal" if path[:2] == ("vision", "blocks") and path[2].startswith("temporal_") else path[0]


def partition(tree: Params, frozen: Collection[str]) -> tuple[Params, Params]:
    """Split a tree of parameters into trained and frozen ones, without empty branches.

    LoRA's adapters in a frozen part are trained.
    """
    leaves = flatten_dict(tree)
    is_frozen = {path: part_name(path) in frozen and LORA_KEY not in path for path in leaves}
    trained = unflatten_dict({path: leaf for path, leaf in leaves.items() if not is_frozen[path]})
    return trained, unflatten_dict({path: leaf for path, leaf in leaves.items() if is_frozen[path]})


def combine(first: Params, second: Params) -> Params:
    """Merge two trees of parameters; a parameter that both have is taken from ``first``."""
    combined: Params = unflatten_dict(flatten_dict(second) | flatten_dict(first))
    return combined
