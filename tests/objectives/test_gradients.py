"""Parameters that a stream's objectives do not use get a gradient of exactly zero, in a model with every part."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig
from mplug2_jax.model.config import PARTS, SpecialTokens, model_config
from mplug2_jax.objectives.config import MlmConfig, VlmConfig
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.training.config import RunConfig, StreamConfig
from mplug2_jax.training.state import make_run_spec
from mplug2_jax.training.step import streams_loss
from tests.close import assert_close

BATCH, VOCABULARY = 4, 32
MODEL = model_config(
    "tiny", dtype="float32", dropout=0.0, width=32, heads=2, mlp_width=32, vision_width=16, vision_heads=2,
    vision_layers=1, image_size=16, text_layers=1, universal_layers=1, fusion_layers=1, decoder_layers=1,
    num_latents=2, vocab_size=VOCABULARY, max_positions=8, contrastive_width=8,
)  # fmt: skip
EVERYTHING = {"image": {"vlm": 1.0}, "video": {"caption": 1.0}, "text": {"mlm": 1.0}}
OBJECTIVES = {"image": {"ilm": 2.0}, "video": {"vlc": 1.0}, "text": {"mlm": 0.5}}


def make_config(streams):
    """Make a run with these streams, each with weighted objectives."""

    def data(kind):
        return DataConfig(sources={"digits": SourceConfig(kind=kind)}, examples=ExampleConfig(), batch_size=BATCH)

    return RunConfig(
        name="gradients", steps=1, model=MODEL,
        tasks=TasksConfig(vlm=VlmConfig(group_size=BATCH), mlm=MlmConfig(mask_rate=0.5)),
        streams={kind: StreamConfig(data=data(kind), objectives=weights) for kind, weights in streams.items()},
    )  # fmt: skip


def make_batch(kind):
    rng = np.random.default_rng(0)

    def tokens():
        return jnp.asarray(rng.integers(4, VOCABULARY, size=(BATCH, 6)), jnp.int32).at[:, 0].set(1)

    mask = jnp.arange(6) < jnp.asarray([[6], [5], [4], [6]])
    batch = {
        "text": tokens(), "text_mask": mask, "instruction": tokens(), "instruction_mask": mask, "target": tokens(),
        "target_weights": jnp.ones((BATCH, 6)), "example_id": jnp.arange(BATCH, dtype=jnp.int32),
    }  # fmt: skip
    if kind != "text":
        shape = (BATCH, {"image": 1, "video": 3}[kind], 16, 16, 3)
        batch["frames"] = jnp.asarray(rng.integers(0, 256, size=shape), jnp.uint8)
    return batch


@pytest.fixture(scope="module")
def spec():
    """Return a run whose model has every part, and random parameters, as zeros would block gradients."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    spec = make_run_spec(make_config(EVERYTHING), SpecialTokens(begin=1, end=2, mask=3), mesh)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.3, jnp.float32), spec.model_def.shapes)
    params["contrastive"]["temperature"] = jnp.asarray(0.07)
    assert set(spec.model_def.parts) == set(PARTS) - {"classifier"}
    return spec, params


def largest_gradients(spec, params, kind):
    """Return the largest gradient of every parameter for a batch of one stream, and the metrics."""
    one_stream = dataclasses.replace(spec, config=make_config({kind: OBJECTIVES[kind]}))

    def loss(params, batch):
        return streams_loss(one_stream, params, None, {}, {kind: batch}, jax.random.key(3), jnp.zeros(()))

    grad = jax.jit(jax.grad(loss, has_aux=True))
    grads, (metrics, _) = grad(params, make_batch(kind))
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    return {"/".join(key.key for key in path): float(np.abs(leaf).max()) for path, leaf in leaves}, metrics


def is_unused(name, kind):
    """Return whether a stream's objectives do not use a parameter."""
    if kind == "text":
        visual = ("vision", "universal/latents", "universal/visual_norm", "universal/layers/cross")
        return name.startswith((*visual, "fusion/", "decoder/", "contrastive/", "matching/"))
    if kind == "image":
        return "/temporal_" in name or name.startswith(("mlm/", "contrastive/", "matching/"))
    return name.startswith(("fusion/", "decoder/", "mlm/", "matching/"))


@pytest.mark.parametrize("kind", ["text", "image", "video"])
def test_gradients_are_exactly_zero_for_unused_parameters_and_only_for_these(spec, kind):
    largest, metrics = largest_gradients(*spec, kind)
    for name, value in largest.items():
        if is_unused(name, kind):
            assert value == 0, name
        elif not name.endswith("key/bias"):  # cancels in the softmax: rounding noise, or zero
            assert value > 0, name
    weighted = sum(weight * metrics[f"{kind}/{objective}/loss"] for objective, weight in OBJECTIVES[kind].items())
    assert_close(metrics["loss"], weighted)
