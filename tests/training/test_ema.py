"""The EMA of parameters: its recursion, who reads it, and that it covers only what is trained."""

import argparse
import functools
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug2_jax.cli.common import restore_run
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.training.config import OptimizerConfig, RunConfig
from mplug2_jax.training.initialization import init_or_load_state
from mplug2_jax.training.loop import device_batches, open_streams
from mplug2_jax.training.state import RunSpec, eval_params, make_run_spec
from mplug2_jax.training.step import make_train_step
from mplug2_jax.training.workdir import WorkDir
from tests.close import assert_close, assert_equal
from tests.runs import text_run
from tests.training.test_initialization import save_checkpoint

mlm_run = functools.partial(text_run, optimizer=OptimizerConfig(learning_rate=1e-2))


def make_spec(config: RunConfig) -> RunSpec:
    return make_run_spec(config, SpecialTokens(), make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]))


def shift(tree: Any) -> Any:
    return jax.tree.map(lambda x: x + 1, tree)


@pytest.mark.parametrize("overrides", [{}, {"freeze": ("text",), "param_dtype": "bfloat16"}], ids=["all", "part"])
@pytest.mark.slow
def test_the_ema_follows_every_update_of_trained_parameters(overrides: dict[str, Any]) -> None:
    config = mlm_run(ema_decay=0.75, **overrides)
    spec = make_spec(config)
    state, step = spec.init(), make_train_step(spec)
    expected = {part: jax.tree.map(lambda x: np.asarray(x, np.float32), state["params"][part]) for part in state["ema"]}
    batches = device_batches(open_streams(config, WorkDir(Path("nowhere")).load_tokenizer(config)), spec.mesh, 0)
    for _ in range(3):
        state, _ = step(state, next(batches)[0])
        expected = jax.tree.map(
            lambda a, p: 0.75 * a + 0.25 * np.asarray(p, np.float32),
            expected,
            {part: state["params"][part] for part in expected},
        )
    assert state["ema"].keys() == {"text", "universal", "mlm"} - set(config.freeze)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state["ema"])} == {"float32"}
    assert_close(state["ema"], expected)
    distance = jax.tree.map(lambda a, p: float(jnp.abs(a - p).max()), state["ema"]["mlm"], state["params"]["mlm"])
    assert max(jax.tree.leaves(distance)) > 1e-4
    sharding = state["ema"]["mlm"]["dense"]["kernel"].sharding
    assert sharding == state["params"]["mlm"]["dense"]["kernel"].sharding
    assert not sharding.is_fully_replicated
    assert_equal(eval_params(spec, state), {**state["params"], **state["ema"]})


@pytest.mark.slow
def test_commands_read_the_ema_or_on_request_the_last_parameters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = mlm_run(ema_decay=0.9, freeze=("text",))
    workdir = WorkDir(tmp_path)
    tokenizer = workdir.load_tokenizer(config)
    workdir.initialize(config, tokenizer)
    spec = make_spec(config)
    state = spec.init()
    state["ema"] = shift(state["ema"])
    save_checkpoint(tmp_path, spec, state)

    def open_params(*overrides: str) -> Any:
        args = argparse.Namespace(workdir=tmp_path, step=None, overrides=list(overrides))
        return restore_run(args)[1]

    caplog.set_level(logging.INFO, logger="absl")
    message = "step 3: using the EMA parameters; --config.ema_decay=0 selects the last ones"
    assert_equal(open_params(), {**state["params"], **state["ema"]})
    assert caplog.messages.count(message) == 1
    assert_equal(open_params("--config.ema_decay=0"), state["params"])
    assert caplog.messages.count(message) == 1


def test_a_run_is_initialized_from_the_ema_of_another_and_its_own_starts_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="absl")
    source = make_spec(mlm_run(ema_decay=0.9, freeze=("text",), seed=7))
    state = source.init()
    state["ema"] = shift(state["ema"])
    save_checkpoint(tmp_path, source, state)
    loaded = init_or_load_state(make_spec(mlm_run(ema_decay=0.5, init_from=str(tmp_path))))
    assert f"initializing from {tmp_path} (step 3, EMA weights): mlm, text, universal" in caplog.messages
    assert_equal(loaded["params"], {**state["params"], **state["ema"]})
    assert_equal(loaded["ema"], loaded["params"])
    buffers = [{leaf.unsafe_buffer_pointer() for leaf in _shards(loaded[tree])} for tree in ("params", "ema")]
    assert not buffers[0] & buffers[1]  # a step donates both, so they must not share memory


def _shards(tree: Any) -> list[Any]:
    return [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_an_invalid_decay_is_refused(decay: float) -> None:
    with pytest.raises(UserError, match=rf"config\.ema_decay={decay} must be between 0 and 1"):
        mlm_run(ema_decay=decay)
