"""Self-critical training in runs: on any mesh, resumed, and with its FLOPs."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from data_pipelines.config import ExampleConfig, InstructionConfig
from data_pipelines.tokenizers import Tokenizer
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.generation.decode import generate
from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.objectives.cider import count_document_frequencies
from mplug2_jax.objectives.config import ScstConfig
from mplug2_jax.objectives.forward import ForwardPass
from mplug2_jax.objectives.scst import scst_loss
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.training.config import OptimizerConfig, RunConfig
from mplug2_jax.training.initialization import init_or_load_state
from mplug2_jax.training.loop import device_batches, open_streams, train
from mplug2_jax.training.state import make_run_spec
from mplug2_jax.training.step import make_train_step
from mplug2_jax.training.telemetry.flops import count_flops
from mplug2_jax.training.telemetry.metric_log import read_train_metrics
from mplug2_jax.training.telemetry.step_flops import count_gradient_flops
from mplug2_jax.training.workdir import special_tokens
from tests.close import CHAIN, assert_close
from tests.runs import small_model, small_run, stream

LENGTH, REFERENCES = 12, 3
DESCRIBE = ExampleConfig(
    instructions={"caption": InstructionConfig(templates=("",))}, target_length=LENGTH, max_references=REFERENCES
)


def scst_run(**overrides: Any) -> RunConfig:
    """Return a run on DigitWorld's images. A large eps keeps updates by rounding noise in gradients negligible."""
    fields = {
        "streams": {"pictures": stream("image", 8, DESCRIBE, scst=1.0)},
        "tasks": TasksConfig(scst=ScstConfig(num_samples=2, num_documents=100)),
        "optimizer": OptimizerConfig(learning_rate=1e-2, eps=1e-2),
        "evaluations": {},
    }
    return small_run(**(fields | overrides))


def train_history(config: RunConfig, tokenizer: Tokenizer, devices: int) -> list[dict[str, float]]:
    mesh = make_mesh(config.mesh if devices > 1 else MeshConfig(data=1), jax.devices()[:devices])
    spec, streams = make_run_spec(config, special_tokens(tokenizer), mesh), open_streams(config, tokenizer)
    state, step = init_or_load_state(spec, streams), make_train_step(spec)
    batches, history = device_batches(streams, mesh, 0), []
    for _ in range(2):
        state, metrics = step(state, next(batches)[0])
        history.append({name: float(value) for name, value in metrics.items()})
    return history


def split_losses(line: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    losses = {name: value for name, value in line.items() if name.endswith("loss")}
    return losses, {name: value for name, value in line.items() if name not in losses}


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(tokenizer: Tokenizer) -> None:
    """With micro-batches that sample their own captions, and parameters gathered per step or per layer."""
    config = scst_run(grad_accum_steps=2, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    single = train_history(config, tokenizer, 1)
    assert all(line["pictures/scst/reward"] > 0 for line in single)
    assert all(1 < line["pictures/scst/length"] < LENGTH for line in single)
    assert single[0]["gradient_norm"] > 0
    for gather in ("layer", "step"):
        for actual, expected in zip(
            train_history(dataclasses.replace(config, fsdp_gather=gather), tokenizer, 8), single, strict=True
        ):
            (losses, metrics), (expected_losses, expected_metrics) = split_losses(actual), split_losses(expected)
            assert_close(losses, expected_losses, scale=0.01)  # advantages add up to zero and nearly cancel
            assert_close(metrics, expected_metrics, CHAIN)


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    """The n-gram frequencies are in the checkpoints, and are not counted again."""
    config = scst_run()
    train(config, tmp_path / "through")
    shutil.copytree(tmp_path / "through", tmp_path / "interrupted")
    shutil.rmtree(tmp_path / "interrupted" / "checkpoints" / "4")
    train(config, tmp_path / "interrupted")
    uninterrupted, interrupted = (
        read_train_metrics(tmp_path / name / "metrics.jsonl") for name in ("through", "interrupted")
    )
    repeated = interrupted[-2:]
    assert [line["step"] for line in repeated] == [3, 4]
    names = [name for name in uninterrupted[0] if name.startswith(("loss", "pictures/", "gradient", "parameter"))]
    assert "pictures/scst/reward" in names
    for actual, expected in zip(repeated, uninterrupted[-2:], strict=True):
        assert {name: actual[name] for name in names} == {name: expected[name] for name in names}


def test_captions_of_the_records_are_counted_before_step_1(tokenizer: Tokenizer) -> None:
    config = scst_run()
    spec = make_run_spec(config, special_tokens(tokenizer), make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]))
    streams = open_streams(config, tokenizer)
    frequencies = init_or_load_state(spec, streams)["frequencies"]
    captions = list(streams["pictures"].references(100))
    assert len(captions) == 100
    assert_close(np.exp(frequencies.log_documents), 100.0)
    expected = count_document_frequencies(captions, special_tokens(tokenizer))
    jax.tree.map(np.testing.assert_array_equal, frequencies, expected)
    for array, shape in zip(jax.tree.leaves(frequencies), jax.tree.leaves(spec.shapes["frequencies"]), strict=True):
        assert (array.shape, array.dtype, array.sharding) == (shape.shape, shape.dtype, shape.sharding)
        assert array.sharding.is_fully_replicated


def test_flops_count_sampling_once_and_for_the_longest_caption() -> None:
    config = scst_run(model=small_model(attention="xla"))
    spec = make_run_spec(config, SpecialTokens(), make_mesh(MeshConfig(), jax.devices()[:1]))
    batch = {
        key: jax.ShapeDtypeStruct(shape, np.int32 if dtype == np.int64 else dtype)
        for key, (shape, dtype) in config.streams["pictures"].data.shapes().items()
    }
    search = SearchConfig(num_beams=2, min_length=0, max_length=LENGTH - 1, top_p=1.0)

    def sample(params: Any, memory: Any, mask: Any, ids: Any) -> Any:
        decoder = spec.model_def.bind(params).decoder
        return generate(decoder, memory, mask, search, SpecialTokens(), ids)

    def loss(params: Any, batch: Any, ids: Any, lengths: Any) -> Any:
        return scst_loss(ForwardPass(spec.model_def.bind(params), batch), ids, lengths, SpecialTokens()).loss

    shapes = spec.model_def.shapes
    memory = jax.eval_shape(lambda p, b: ForwardPass(spec.model_def.bind(p), b).caption_memory, shapes, batch)
    sampled = jax.eval_shape(sample, shapes, *memory, batch["example_id"])
    sampling_flops = count_flops(sample, shapes, *memory, batch["example_id"], trip_count=LENGTH - 1)
    loss_flops = count_flops(jax.value_and_grad(loss), shapes, batch, sampled.ids, sampled.lengths)
    step_flops = count_gradient_flops(spec, config.streams, {"pictures": batch}, remat=False)
    assert step_flops.total() == sampling_flops.total() + loss_flops.total()
    assert sampling_flops.total() > (LENGTH - 1) * 2 * 16 * config.model.width * config.model.vocab_size
