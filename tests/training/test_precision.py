"""Precision of the state: 16-bit parameters and moments, moments on the host. Less memory, almost equal losses."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from data_pipelines.tokenizers import Tokenizer
from mplug2_jax.errors import UserError
from mplug2_jax.evaluation.loop import jit_predict
from mplug2_jax.objectives.config import DistillationConfig
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.planning.programs import abstract_batch
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints
from mplug2_jax.training.config import OptimizerConfig, RunConfig
from mplug2_jax.training.loop import data_position, device_batches, open_streams
from mplug2_jax.training.state import RunSpec, make_run_spec
from mplug2_jax.training.step import jit_train_step, make_train_step
from mplug2_jax.training.workdir import special_tokens
from tests.close import assert_close
from tests.runs import text_run

STEPS = 4


def masked_words(param_dtype: str = "float32", **optimizer: Any) -> RunConfig:
    adam = OptimizerConfig(learning_rate=1e-2, b2=0.95, eps=1e-2, **optimizer)
    return text_run(optimizer=adam, param_dtype=param_dtype)


def make_spec(config: RunConfig, tokenizer: Tokenizer) -> RunSpec:
    return make_run_spec(config, special_tokens(tokenizer), make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]))


def run(config: RunConfig, tokenizer: Tokenizer) -> tuple[Any, list[float]]:
    spec = make_spec(config, tokenizer)
    state, step, losses = spec.init(), make_train_step(spec), []
    batches = device_batches(open_streams(config, tokenizer), spec.mesh, 0)
    for _ in range(STEPS):
        state, metrics = step(state, next(batches)[0])
        losses.append(float(metrics["loss"]))
    jax.tree.map(
        lambda leaf, expected: None if leaf.sharding == expected else pytest.fail(str(expected)), state, spec.shardings
    )
    return state, losses


@pytest.fixture(scope="module")
def plain(tokenizer: Tokenizer) -> tuple[Any, list[float]]:
    return run(masked_words(), tokenizer)


def num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("precision", ["default", "highest"])
def test_every_matmul_of_a_step_and_of_its_evaluation_has_the_config_s_precision(
    precision: Any, tokenizer: Tokenizer
) -> None:
    config = masked_words()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, matmul_precision=precision))
    spec = make_spec(config, tokenizer)
    batch = abstract_batch(config.streams["text"].data, spec)
    with jax.set_mesh(spec.mesh):
        step = jit_train_step(spec).lower(spec.shapes, {"text": batch}, spec.hyperparam_shapes)
        predict = jit_predict("mlm", spec.model_def, spec.context, spec.mesh)
        masked = abstract_batch(config.streams["text"].data, spec, mask=True)
        predictions = predict.lower(spec.eval_param_shapes, masked)
    for program in (step, predictions):
        matmuls = [line for line in program.as_text().splitlines() if "stablehlo.dot_general" in line]
        assert len(matmuls) >= 8
        assert all(("precision = [HIGHEST, HIGHEST]" in line) == (precision == "highest") for line in matmuls)


@pytest.mark.slow
def test_16_bits_halve_the_memory_and_stay_near_the_losses(plain, tokenizer: Tokenizer) -> None:
    half = {"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"}
    state, losses = run(masked_words(param_dtype="bfloat16", **half), tokenizer)
    assert num_bytes(state["params"]) == num_bytes(plain[0]["params"]) // 2
    assert num_bytes(state["opt"]) < 0.51 * num_bytes(plain[0]["opt"])
    assert losses != plain[1]
    assert_close(losses, plain[1], 2**-7)
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_on_the_host_change_nothing(plain, kind: str, tokenizer: Tokenizer, tmp_path) -> None:
    config = masked_words(offload_moments=True, kind=kind)
    state, losses = run(config, tokenizer)
    expected = plain if kind == "adamw" else run(masked_words(kind=kind), tokenizer)
    assert_close(losses, expected[1])
    assert_close(state["params"], expected[0]["params"])
    kinds = [leaf.sharding.memory_kind for leaf in jax.tree.leaves(state["opt"]) if leaf.size > 3]  # no constants
    assert set(kinds) == {"pinned_host"}
    assert all(leaf.sharding.memory_kind == "device" for leaf in jax.tree.leaves(state["params"]))

    # A checkpoint restores the moments to the host.
    checkpoints = Checkpoints(tmp_path, config.checkpoint)
    checkpoints.save(state, data_position(STEPS, open_streams(config, tokenizer)))
    checkpoints.close()
    restored, _ = Checkpoints(tmp_path, config.checkpoint, read_only=True).restore(make_spec(config, tokenizer).shapes)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert [leaf.sharding.memory_kind for leaf in jax.tree.leaves(restored["opt"]) if leaf.size > 3] == kinds


def test_the_teacher_of_16_bit_parameters_has_32_bits(tokenizer: Tokenizer) -> None:
    settings = TasksConfig(distillation=DistillationConfig())
    spec = make_spec(dataclasses.replace(masked_words("bfloat16"), tasks=settings), tokenizer)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(spec.shapes["params"])} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(spec.shapes["teacher"])} == {"float32"}


def test_16_bits_are_refused_for_a_slow_second_moment() -> None:
    with pytest.raises(UserError, match=r"nu_dtype=bfloat16 is too coarse for b2=0.999: .*set b2 to 0.99 or less"):
        OptimizerConfig(nu_dtype="bfloat16")
    assert OptimizerConfig(mu_dtype="bfloat16").b2 == 0.999
