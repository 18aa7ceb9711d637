"""Freezing by part: what a run does not train gets no gradient, no moments, no decay, and stays as it was."""

from collections.abc import Collection
from typing import Any

from mplug2_jax.model.mplug2 import Params

LORA_KEY = "lora"
"""The name of what stands beside a frozen kernel and is trained in its place: see lora.py."""


def part_name(path: tuple[str, ...]) -> str:
    """The part of the model that a parameter belongs to; the temporal units within the vision tower are one.

    The projection from the tower's width to the model's, which no checkpoint of CLIP or BERT brings, belongs to none:
    it is trained whatever is frozen.
    """
    return "temporal" if path[:2] == ("vision", "blocks") and path[2].startswith("temporal_") else path[0]


def partition(tree: Params, frozen: Collection[str], path: tuple[str, ...] = ()) -> tuple[Params, Params]:
    """A tree of parameters (what is below ``path``) as two without empty branches: the trained, and the frozen.

    What LoRA adds to a frozen part is trained.
    """
    trained: Params = {}
    kept: Params = {}
    for name, item in tree.items():
        own = (*path, name)
        if isinstance(item, dict):
            halves: tuple[Any, Any] = partition(item, frozen, own)
        else:
            halves = ({}, item) if part_name(own) in frozen and LORA_KEY not in own else (item, {})
        for half, found in zip((trained, kept), halves, strict=True):
            if not isinstance(found, dict) or found:
                half[name] = found
    return trained, kept


def combine(one: Params, other: Params) -> Params:
    """Two such trees as one again; a parameter that both have is that of ``one``."""
    return other | {
        name: combine(item, other[name]) if isinstance(item, dict) and name in other else item
        for name, item in one.items()
    }
