"""AdamW and Muon: the release's parameter groups, optax's steps, clipping, what is decayed, what is orthogonalized."""

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
from mplug2_jax.errors import UserError
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.training.config import OptimizerConfig
from mplug2_jax.training.optim.lora import adapter_shapes, add_adapters
from mplug2_jax.training.optim.optimizer import (
    MUON_RMS,
    clip_by_global_norm,
    is_decayed,
    is_orthogonalized,
    is_vision,
    make_optimizer,
)
from tests.close import assert_close, assert_equal
from tests.runs import small_model, small_run


@pytest.mark.parametrize("task", ["caption", "videoqa"])
def test_groups_equal_the_release(reference: Path, task: str) -> None:
    recipe = json.loads((reference / "goldens" / "recipe.json").read_text())["param_groups"]
    golden = next(g for g in load_goldens(reference / "goldens" / recipe["config"]) if g.model == task)
    assert golden.model_def.parts == (CAPTION_PARTS if task == "caption" else QUESTION_PARTS)
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
        "vision": {"blocks": {"dense": {"kernel": (2, 4, 3), "bias": (2, 3)}}, "norm": {"scale": (3,)}},
        "decoder": {"layers": {"dense": {"kernel": (3, 3, 5), "bias": (3, 5)}}, "words": (7, 3)},
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
    config = OptimizerConfig(weight_decay=0.0, clip_norm=0.0)
    actual, expected = run(make_optimizer(config, 1e-2, 1e-2), 5), run(optax.adamw(1e-2, weight_decay=0.0), 5)
    assert_close(actual, expected)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_vision_has_its_own_learning_rate_and_only_kernels_are_decayed(kind: Any) -> None:
    initial = params()
    zero = jax.tree.map(jnp.zeros_like, initial)
    optimizer = make_optimizer(OptimizerConfig(kind=kind, weight_decay=0.5, clip_norm=0.0), 1e-1, 1e-2)
    updates, _ = optimizer.update(zero, optimizer.init(initial), initial)
    blocks, layers = updates["vision"]["blocks"]["dense"], updates["decoder"]["layers"]["dense"]
    assert_close(blocks["kernel"], -5e-3 * initial["vision"]["blocks"]["dense"]["kernel"])
    assert_close(layers["kernel"], -5e-2 * initial["decoder"]["layers"]["dense"]["kernel"])
    for untouched in (
        blocks["bias"], updates["vision"]["norm"]["scale"], updates["decoder"]["words"],
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


def update(kind: Any, tree: Any, scales: Any = None) -> Any:
    """Return the second step of an optimizer whose gradients are sines."""
    optimizer = make_optimizer(OptimizerConfig(kind=kind, weight_decay=0.0, clip_norm=0.0), 1.0, 1.0, scales)
    state = optimizer.init(tree)
    for i in range(2):
        updates, state = optimizer.update(jax.tree.map(lambda x, i=i: jnp.sin(9 * x + i), tree), state, tree)
    return updates


def test_muon_orthogonalizes_each_layer_on_its_own_with_the_rms_of_adamw() -> None:
    kernels = {"up": (3, 16, 64), "down": (3, 64, 16), "query": (3, 32, 32)}
    keys = jax.random.split(jax.random.key(0), len(kernels))
    layers = {name: {"kernel": jax.random.normal(key, kernels[name])} for name, key in zip(kernels, keys, strict=True)}
    tree = {"text": {"layers": layers}}
    stacked, adam = update("muon", tree), update("adamw", tree)
    for name, (depth, rows, columns) in kernels.items():
        whole = stacked["text"]["layers"][name]["kernel"]
        singular = np.linalg.svd(np.asarray(whole), compute_uv=False) / (MUON_RMS * max(rows, columns) ** 0.5)
        assert ((singular > 0.5) & (singular < 1.3)).all()
        rms, adam_rms = (float(jnp.sqrt(jnp.mean(x["text"]["layers"][name]["kernel"] ** 2))) for x in (stacked, adam))
        assert 0.15 < rms < 0.25
        assert adam_rms > rms  # of independent gradients that have not averaged out after two steps
        for i in range(depth):
            layer = {"text": {"layers": {name: {"kernel": layers[name]["kernel"][i : i + 1]}}}}
            assert_close(update("muon", layer)["text"]["layers"][name]["kernel"][0], whole[i], 1e-4)


def test_what_muon_does_not_orthogonalize_takes_the_step_of_adamw_and_scales_act_on_both() -> None:
    tree = params()
    muon, adam = update("muon", tree), update("adamw", tree)
    kernels = [tree["decoder"]["layers"]["dense"].pop("kernel") for tree in (muon, adam)]
    assert float(abs(kernels[0] - kernels[1]).max()) > 0.1
    for each in (muon, adam):
        del each["vision"]["blocks"]["dense"]["kernel"]
    assert_equal(muon, adam)
    halved = update("muon", tree, jax.tree.map(lambda x: np.float32(0.5), tree))
    assert_equal(halved, jax.tree.map(lambda x: 0.5 * x, update("muon", tree)))


def test_muon_takes_the_kernels_of_layers_alone() -> None:
    """Not embeddings, heads, the patch embedding, temporal convolutions, norms, stacked biases, nor adapters."""
    model = small_model(num_classes=3, vision_width=64)
    model_def = define_model(model, (*small_run().parts(), "classifier"))
    shapes = add_adapters(model_def.shapes, ("text",), adapter_shapes(small_run().lora))
    leaves = {
        tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]
    }
    taken = {path for path in leaves if is_orthogonalized(path)}
    assert {len(leaves[path]) for path in taken} == {3}
    assert {path[1] for path in taken} == {"blocks", "layers"}
    assert {path[-2] for path in taken} == {"query", "key", "value", "out", "up", "down"}
    assert {path for path in taken if path[2].startswith("temporal")} == {
        ("vision", "blocks", f"temporal_{i}", name, "kernel") for i in (1, 2) for name in ("up", "down")
    }
    assert {path[:2] for path in set(leaves) - taken if path[-1] == "kernel"} == {
        ("vision", "patch"), ("vision", "blocks"), ("vision_projection", "dense"), ("contrastive", "visual"),
        ("contrastive", "text"), ("matching", "dense"), ("mlm", "dense"), ("decoder", "head"), ("classifier", "dense"),
    }  # fmt: skip


def test_a_momentum_that_is_not_read_is_refused() -> None:
    with pytest.raises(UserError, match=r"config.optimizer.muon_momentum=0.9 is not read by kind='adamw'"):
        OptimizerConfig(muon_momentum=0.9)
