"""Long video clips on a TPU, compiled ahead of time: the sequence axis reduces each chip's memory."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest

from data_pipelines.config import ExampleConfig
from mplug2_jax.model.config import SpecialTokens, model_config
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.placement import batch_sharding
from mplug2_jax.training.state import make_run_spec
from mplug2_jax.training.step import jit_train_step
from tests.runs import small_run, stream
from tests.tpu import topology_mesh

FRAMES = 128  # 2,049 tokens: activations outweigh gradients, as in a large model
MODEL = model_config("tiny", vision_layers=2, decoder_layers=1, dropout=0.0, attention_dropout=0.0)


def compile_step(mesh: MeshConfig, clips: int) -> jax.stages.Compiled:
    captions = dataclasses.replace(stream("video", clips, ExampleConfig(), caption=1.0))
    config = small_run(model=MODEL, streams={"clips": captions}, evaluations={})
    spec = make_run_spec(config, SpecialTokens(), topology_mesh("v5e:2x2", mesh))

    def array(shape: tuple[int, ...], dtype: object) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(spec.mesh))

    batch = {
        "frames": array((clips, FRAMES, MODEL.image_size, MODEL.image_size, 3), jnp.uint8),
        "target": array((clips, 16), jnp.int32),
        "target_weights": array((clips, 16), jnp.float32),
    }
    with jax.set_mesh(spec.mesh):
        return jit_train_step(spec).lower(spec.shapes, {"clips": batch}, spec.hyperparam_shapes).compile()


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_a_sharded_clip_is_never_gathered_in_the_vision_tower() -> None:
    replicated, sharded = compile_step(MeshConfig(data=4, fsdp=1), 4), compile_step(MeshConfig(fsdp=1, sequence=4), 1)
    temporary = [program.memory_analysis().temp_size_in_bytes for program in (replicated, sharded)]
    assert temporary[1] < 0.3 * temporary[0]
    gathered = re.findall(r"\w+\[([\d,]+)\]\S* all-gather(?:-start)?\(", sharded.as_text())
    assert gathered  # at least the keys of the universal layers
    assert (
        max(math.prod(map(int, g.split(","))) for g in gathered) < FRAMES * (MODEL.num_patches + 1) * MODEL.vision_width
    )
