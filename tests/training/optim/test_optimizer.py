"""AdamW: the release's parameter groups, optax's steps, clipping, and what is decayed."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mplug2_jax.conversion.layouts.official import CAPTION_PARTS, QUESTION_PARTS
from mplug2_jax.conversion.parity.goldens import load_goldens
from mplug2_jax.training.config import AdamWConfig
from mplug2_jax.training.optim.optimizer import adamw, clip_by_global_norm, is_decayed, is_vision
from tests.close import assert_close


@pytest.mark.parametrize("task", ["caption", "videoqa"])
def test_groups_equal_the_release(reference: Path, task: str) -> None:
    recipe = json.loads((reference / "goldens" / "recipe.json").read_text())["param_groups"]
    golden = next(g for g in load_goldens(reference / "goldens" / recipe["config"]) if g.model == task)
    assert golden.definition.parts == (CAPTION_PARTS if task == "caption" else QUESTION_PARTS)
    expected = {name: (group["lr"], group["weight_decay"]) for group in recipe[task] for name in group["params"]}
    learning_rates = sorted({lr for lr, _ in expected.values()})
    assert len(learning_rates) == 2
    for mapping in golden.mappings:
        actual = (
            learning_rates[0] if is_vision(mapping.path) else learning_rates[1],
            0.02 if is_decayed(mapping.path, "released") else 0.0,
        )
        assert actual == expected[mapping.name], mapping.name


def params() -> dict[str, Any]:
    key = jax.random.key(0)
    shapes = {
        "vision": {"dense": {"kernel": (4, 3), "bias": (3,)}, "norm": {"scale": (3,)}},
        "decoder": {"dense": {"kernel": (3, 5), "bias": (5,)}, "words": (7, 3)},
    }
    return jax.tree.map(lambda s: jax.random.normal(key, s), shapes, is_leaf=lambda s: isinstance(s, tuple))


def run(optimizer: optax.GradientTransformation, steps: int) -> Any:
    tree, state = params(), optimizer.init(params())
    for i in range(steps):
        grads = jax.tree.map(lambda x, i=i: jnp.sin(x + i), tree)
        updates, state = optimizer.update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree


def test_steps_equal_optax_adamw_without_groups() -> None:
    config = AdamWConfig(weight_decay=0.0, clip_norm=0.0)
    actual, expected = run(adamw(config, 1e-2, 1e-2), 5), run(optax.adamw(1e-2, weight_decay=0.0), 5)
    assert_close(actual, expected)


def test_vision_has_its_own_learning_rate_and_only_kernels_are_decayed() -> None:
    initial = params()
    zero = jax.tree.map(jnp.zeros_like, initial)
    optimizer = adamw(AdamWConfig(weight_decay=0.5, clip_norm=0.0), 1e-1, 1e-2)
    updates, _ = optimizer.update(zero, optimizer.init(initial), initial)
    assert_close(updates["vision"]["dense"]["kernel"], -5e-3 * initial["vision"]["dense"]["kernel"])
    assert_close(updates["decoder"]["dense"]["kernel"], -5e-2 * initial["decoder"]["dense"]["kernel"])
    for untouched in (
        updates["vision"]["dense"]["bias"], updates["vision"]["norm"]["scale"], updates["decoder"]["words"],
    ):  # fmt: skip
        assert not np.any(untouched)


def test_depthwise_temporal_kernels_are_not_decayed() -> None:
    assert is_decayed(("vision", "blocks", "temporal_1", "down", "kernel"), "kernels")
    assert not is_decayed(("vision", "blocks", "temporal_1", "kernel"), "kernels")


def test_clipping_bounds_the_norm_and_leaves_small_gradients_alone() -> None:
    clip = clip_by_global_norm(1.0)
    large = {"a": jnp.full(4, 3.0), "b": jnp.full(5, -2.0)}
    clipped, _ = clip.update(large, clip.init(large))
    assert_close(optax.tree.norm(clipped), 1.0)
    reference = optax.clip_by_global_norm(1.0)
    expected, _ = reference.update(large, reference.init(large))
    assert_close(clipped, expected)
    small = {"a": jnp.full(4, 1e-3)}
    np.testing.assert_array_equal(clip.update(small, clip.init(small))[0]["a"], small["a"])
