"""Self-critical training in runs: on any mesh, interrupted, and counted."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from data_pipelines.config import ExampleConfig, InstructionConfig
from data_pipelines.digitworld import vocabulary_texts
from data_pipelines.tokenizers import Tokenizer, train_wordpiece
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.generation.decode import generate
from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.objectives.cider import count_document_frequencies
from mplug2_jax.objectives.config import ScstConfig
from mplug2_jax.objectives.forward import ForwardPass
from mplug2_jax.objectives.scst import scst_loss
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.tasks.config import TaskSettings
from mplug2_jax.training.config import AdamWConfig, RunConfig
from mplug2_jax.training.initialization import init_or_load_state
from mplug2_jax.training.loop import device_batches, open_streams, train
from mplug2_jax.training.state import make_run_spec
from mplug2_jax.training.step import make_step
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


def rewarded(**overrides: Any) -> RunConfig:
    """Pictures of DigitWorld. With a large eps a gradient that is rounding noise stays a step that is."""
    fields = {
        "streams": {"pictures": stream("image", 8, DESCRIBE, scst=1.0)},
        "tasks": TaskSettings(scst=ScstConfig(num_samples=2, num_documents=100)),
        "optimizer": AdamWConfig(learning_rate=1e-2, eps=1e-2),
        "evaluations": {},
    }
    return small_run(**(fields | overrides))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece(vocabulary_texts(100), 200)


def curve(config: RunConfig, tokenizer: Tokenizer, devices: int) -> list[dict[str, float]]:
    mesh = make_mesh(config.mesh if devices > 1 else MeshConfig(data=1), jax.devices()[:devices])
    spec, streams = make_run_spec(config, special_tokens(tokenizer), mesh), open_streams(config, tokenizer)
    state, step = init_or_load_state(spec, streams), make_step(spec)
    batches, history = device_batches(streams, mesh, 0), []
    for _ in range(2):
        state, metrics = step(state, next(batches)[0])
        history.append({name: float(value) for name, value in metrics.items()})
    return history


def losses_apart(line: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    losses = {name: value for name, value in line.items() if name.endswith("loss")}
    return losses, {name: value for name, value in line.items() if name not in losses}


@pytest.mark.slow
def test_eight_devices_give_the_curve_of_one(tokenizer: Tokenizer) -> None:
    """Dropout is on elsewhere, micro-batches draw captions of their own, parameters are gathered once or always."""
    config = rewarded(grad_accum_steps=2, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    alone = curve(config, tokenizer, 1)
    assert all(line["pictures/scst/reward"] > 0 for line in alone)
    assert all(1 < line["pictures/scst/length"] < LENGTH for line in alone)
    assert alone[0]["gradient_norm"] > 0
    for gather in ("layer", "step"):
        for ours, theirs in zip(
            curve(dataclasses.replace(config, fsdp_gather=gather), tokenizer, 8), alone, strict=True
        ):
            (losses, rest), (their_losses, their_rest) = losses_apart(ours), losses_apart(theirs)
            assert_close(losses, their_losses, scale=0.01)  # advantages add up to zero, and nearly cancel
            assert_close(rest, their_rest, CHAIN)


@pytest.mark.slow
def test_a_run_that_goes_on_is_as_if_never_interrupted(tmp_path: Path) -> None:
    """What weighs n-grams is in its checkpoints, and is not counted again."""
    config = rewarded()
    train(config, tmp_path / "through")
    shutil.copytree(tmp_path / "through", tmp_path / "interrupted")
    shutil.rmtree(tmp_path / "interrupted" / "checkpoints" / "4")
    train(config, tmp_path / "interrupted")
    through, interrupted = (
        read_train_metrics(tmp_path / name / "metrics.jsonl") for name in ("through", "interrupted")
    )
    again = interrupted[-2:]
    assert [line["step"] for line in again] == [3, 4]
    kept = [name for name in through[0] if name.startswith(("loss", "pictures/", "gradient", "parameter"))]
    assert "pictures/scst/reward" in kept
    for ours, theirs in zip(again, through[-2:], strict=True):
        assert {name: ours[name] for name in kept} == {name: theirs[name] for name in kept}


def test_a_run_counts_the_captions_of_its_records_before_it_begins(tokenizer: Tokenizer) -> None:
    config = rewarded()
    spec = make_run_spec(config, special_tokens(tokenizer), make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]))
    streams = open_streams(config, tokenizer)
    found = init_or_load_state(spec, streams)["frequencies"]
    counted = list(streams["pictures"].references(100))
    assert len(counted) == 100
    assert_close(np.exp(found.log_documents), 100.0)
    jax.tree.map(np.testing.assert_array_equal, found, count_document_frequencies(counted, special_tokens(tokenizer)))
    for made, make_spec in zip(jax.tree.leaves(found), jax.tree.leaves(spec.shapes["frequencies"]), strict=True):
        assert (made.shape, made.dtype, made.sharding) == (make_spec.shape, make_spec.dtype, make_spec.sharding)
        assert made.sharding.is_fully_replicated


def test_drawing_captions_counts_as_so_many_turns_as_they_may_be_long() -> None:
    """And drawing is computed once, without a gradient."""
    config = rewarded(model=small_model(attention="xla"))
    spec = make_run_spec(config, SpecialTokens(), make_mesh(MeshConfig(), jax.devices()[:1]))
    batch = {
        key: jax.ShapeDtypeStruct(shape, np.int32 if dtype == np.int64 else dtype)
        for key, (shape, dtype) in config.streams["pictures"].data.shapes().items()
    }
    search = SearchConfig(num_beams=2, min_length=0, max_length=LENGTH - 1, top_p=1.0)

    def drawn(params: Any, memory: Any, seen: Any, ids: Any) -> Any:
        decoder = spec.definition.bind(params).decoder
        return generate(decoder, memory, seen, search, SpecialTokens(), ids)

    def learned(params: Any, batch: Any, said: Any, lengths: Any) -> Any:
        return scst_loss(ForwardPass(spec.definition.bind(params), batch), said, lengths, SpecialTokens()).loss

    shapes = spec.definition.shapes
    memory = jax.eval_shape(lambda p, b: ForwardPass(spec.definition.bind(p), b).caption_memory, shapes, batch)
    found = jax.eval_shape(drawn, shapes, *memory, batch["example_id"])
    drawing = count_flops(drawn, shapes, *memory, batch["example_id"], turns=LENGTH - 1)
    learning = count_flops(jax.value_and_grad(learned), shapes, batch, found.ids, found.lengths)
    counted = count_gradient_flops(spec, config.streams, {"pictures": batch}, remat=False)
    assert counted.total() == drawing.total() + learning.total()
    assert drawing.total() > (LENGTH - 1) * 2 * 16 * config.model.width * config.model.vocab_size
