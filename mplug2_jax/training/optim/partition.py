"""Freezing by part: a frozen parameter gets no gradient, no moments and no weight decay, and never changes."""

from collections.abc import Collection
from typing import Any

from mplug2_jax.model.mplug2 import Params

LORA_KEY = "lora"
"""The key, next to a frozen kernel, of the adapter that is trained in its place: see lora.py."""


def part_name(path: tuple[str, ...]) -> str:
    """Return the part of the model that a parameter belongs to; the temporal units in the vision tower are one.

    The projection from the tower's width to the model's, which no checkpoint of CLIP or BERT provides, belongs to none:
    it is always trained.
    """
    return "temporal" if path[:2] == ("vision", "blocks") and path[2].startswith("temporal_") else path[0]


def partition(tree: Params, frozen: Collection[str], path: tuple[str, ...] = ()) -> tuple[Params, Params]:
    """Split a tree of parameters (what is below ``path``) into trained and frozen ones, without empty branches.

    LoRA's adapters in a frozen part are trained.
    """
    trained_params: Params = {}
    frozen_params: Params = {}
    for name, item in tree.items():
        place = (*path, name)
        if isinstance(item, dict):
            halves: tuple[Any, Any] = partition(item, frozen, place)
        else:
            halves = ({}, item) if part_name(place) in frozen and LORA_KEY not in place else (item, {})
        for half, content in zip((trained_params, frozen_params), halves, strict=True):
            if not isinstance(content, dict) or content:
                half[name] = content
    return trained_params, frozen_params


def combine(first: Params, second: Params) -> Params:
    """Merge two trees of parameters; a parameter that both have is taken from ``first``."""
    return second | {
        name: combine(item, second[name]) if isinstance(item, dict) and name in second else item
        for name, item in first.items()
    }
