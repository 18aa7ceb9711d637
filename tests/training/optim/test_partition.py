"""Freezing: what is frozen stays to the bit, costs no moments and no gradient; the rest learns as it would."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.model.config import PARTS, SpecialTokens, model_config
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.objectives.config import DistillationConfig
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.planning.programs import abstract_batch
from mplug2_jax.tasks.config import TaskSettings
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints
from mplug2_jax.training.checkpoint.checksums import leaf_name
from mplug2_jax.training.checkpoint.metadata import DataPosition
from mplug2_jax.training.config import AdamWConfig, CheckpointConfig, RunConfig
from mplug2_jax.training.loop import describe, device_batches, open_streams
from mplug2_jax.training.optim.partition import combine, part_name, partition
from mplug2_jax.training.state import RunSpec, make_run_spec
from mplug2_jax.training.step import jit_train_step, make_step
from mplug2_jax.training.telemetry.step_flops import count_gradient_flops
from mplug2_jax.training.workdir import WorkDir, special_tokens
from tests.close import CHAIN, assert_close
from tests.runs import small_run

TAUGHT = TaskSettings(distillation=DistillationConfig(momentum=0.5))


def answers(**overrides: Any) -> RunConfig:
    """Questions about clips: every part between pixels and words, the temporal units too."""
    clips = dataclasses.replace(small_run().streams["video_text"], objectives={"answer": 1.0})
    return small_run(
        streams={"clips": clips}, evaluations={}, optimizer=AdamWConfig(learning_rate=1e-2, weight_decay=0.5),
        **overrides,
    )  # fmt: skip


def words(**overrides: Any) -> RunConfig:
    """Masked words: text, universal layers and a head."""
    text = dataclasses.replace(small_run().streams["text"], objectives={"mlm": 1.0})
    optimizer = AdamWConfig(learning_rate=1e-2, weight_decay=0.5, clip_norm=0.0)
    return small_run(streams={"text": text}, evaluations={}, optimizer=optimizer, **overrides)


def make_spec(config: RunConfig, devices: int = 1) -> RunSpec:
    mesh = MeshConfig(fsdp=devices)
    tokens = special_tokens(WorkDir(Path("nowhere")).load_tokenizer(config))
    return make_run_spec(config, tokens, make_mesh(mesh, jax.devices()[:devices]))


def trained(config: RunConfig, steps: int, devices: int = 1) -> tuple[Any, Any, dict[str, float]]:
    """The first parameters, the last state and the last metrics."""
    spec = make_spec(config, devices)
    state, step = spec.init(), make_step(spec)
    start = jax.tree.map(np.asarray, state["params"])
    streams = open_streams(config, WorkDir(Path("nowhere")).load_tokenizer(config))
    batches, metrics = device_batches(streams, spec.mesh, 0), {}
    for _ in range(steps):
        state, metrics = step(state, next(batches)[0])
    return start, state, {name: float(value) for name, value in metrics.items()}


def leaves(tree: Any) -> dict[str, Any]:
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_splitting_goes_by_part_and_joining_undoes_it() -> None:
    shapes = define_model(model_config("tiny", num_classes=2, vision_width=64), tuple(PARTS)).shapes
    found = {part_name(tuple(name.split("/"))) for name in leaves(shapes)}
    assert found == {*PARTS, "vision_projection"}
    for frozen in ((), ("vision",), ("temporal",), ("vision", "temporal", "mlm"), tuple(PARTS)):
        ours, theirs = partition(shapes, frozen)
        assert {part_name(tuple(name.split("/"))) for name in leaves(theirs)} == set(frozen)
        assert leaves(ours).keys() | leaves(theirs).keys() == leaves(shapes).keys()
        assert not leaves(ours).keys() & leaves(theirs).keys()
        assert combine(ours, theirs) == combine(theirs, ours) == shapes
    ours, theirs = partition(shapes, ("vision",))
    assert set(ours["vision"]["blocks"]) == {"temporal_1", "temporal_2"}
    assert partition(shapes, ("vision", "temporal"))[0].keys() == shapes.keys() - {"vision"}


@pytest.mark.parametrize(
    ("frozen", "said"),
    [
        (("viscon",), r"config\.freeze names 'viscon': did you mean 'vision'\?"),
        (("mlm",), r"config\.freeze names 'mlm': valid: decoder, fusion, temporal, text, universal, vision"),
        (("vision", "temporal", "text", "universal", "fusion", "decoder"), "leaves nothing to train"),
    ],
)
def test_parts_that_cannot_be_frozen_are_refused(frozen: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        answers(freeze=frozen)


@pytest.mark.parametrize(
    ("config", "devices"),
    [
        (answers(freeze=("vision", "text")), 1),
        (words(freeze=("text",), grad_accum_steps=2, fsdp_gather="step"), 2),
        (words(freeze=("mlm",), param_dtype="bfloat16", tasks=TAUGHT), 1),
    ],
    ids=["clips", "gathered once", "taught"],
)
@pytest.mark.slow
def test_the_frozen_stay_to_the_bit_and_the_rest_moves(config: RunConfig, devices: int) -> None:
    start, state, metrics = trained(config, 3, devices)
    frozen = set(config.freeze)
    for name, leaf in leaves(state["params"]).items():
        same = np.array_equal(leaf, leaves(start)[name])
        if part_name(tuple(name.split("/"))) in frozen:
            assert same, name
        elif name.endswith("kernel"):
            assert not same, name
    # The temporal units stay in the vision tower's branch.
    assert {name for name in metrics if name.startswith("gradient_norm/")} == {
        f"gradient_norm/{part}" for part in state["params"] if part not in frozen - {"vision"}
    }
    assert all(f"parameter_norm/{part}" in metrics for part in state["params"])
    moments = state["opt"][0 if config.optimizer.clip_norm == 0 else 1]
    for tree in (moments.mu, moments.nu):
        assert leaves(tree).keys() == leaves(partition(state["params"], frozen)[0]).keys()


@pytest.mark.slow
def test_what_is_not_frozen_gets_the_gradient_that_it_would() -> None:
    """Above and below what is frozen."""
    whole, less = (trained(words(freeze=parts), 1)[1]["opt"][0].mu for parts in ((), ("universal",)))
    assert less.keys() == {"text", "mlm"}
    for part in less:
        assert_close(less[part], whole[part], CHAIN)
        assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(less[part])) > 1e-4


def flops(*frozen: str) -> float:
    spec = make_spec(words(freeze=frozen))
    batches = {name: abstract_batch(stream.data, spec) for name, stream in spec.config.streams.items()}
    with jax.set_mesh(spec.mesh):
        analysis = jit_train_step(spec).lower(spec.shapes, batches).compile().cost_analysis()
    return analysis["flops"]


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_backward_pass_is_smaller() -> None:
    """What lies below the lowest trained layer has none; what a gradient must pass has none of its weights."""
    whole, middle, bottom = flops(), flops("universal"), flops("text", "universal")
    assert bottom < 0.9 * middle
    assert middle < 0.9 * whole


@pytest.mark.slow
def test_costs_are_counted_without_what_is_frozen() -> None:
    specs = [make_spec(answers(freeze=frozen)) for frozen in ((), ("vision", "temporal"))]
    batches = {"clips": abstract_batch(specs[0].config.streams["clips"].data, specs[0])}
    whole, less = (count_gradient_flops(spec, spec.config.streams, batches, remat=False) for spec in specs)
    assert less["vision"] < 0.4 * whole["vision"]  # forward alone
    assert less["decoder"] == whole["decoder"]


def test_a_frozen_layer_that_a_gradient_passes_counts_twice_and_not_three_times() -> None:
    specs = [make_spec(words(freeze=frozen)) for frozen in ((), ("universal",))]
    batches = {"text": abstract_batch(specs[0].config.streams["text"].data, specs[0])}
    whole, less = (count_gradient_flops(spec, spec.config.streams, batches, remat=False) for spec in specs)
    assert {part for part in whole if whole[part] != less[part]} == {"universal"}
    assert less["universal"] < 0.75 * whole["universal"]


def test_a_run_goes_on_from_its_checkpoint_and_with_another_list_does_not(tmp_path: Path) -> None:
    config = words(freeze=("text",))
    state = make_spec(config).init()
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    checkpoints.save(state, DataPosition(2, {}))
    checkpoints.wait_until_finished()
    restored, _ = checkpoints.restore(make_spec(config).shapes)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    workdir = WorkDir(tmp_path / "run")
    workdir.initialize(config, None)
    with pytest.raises(UserError, match=r"freeze was \['text'\] and is \[\]. Use the same config to resume it"):
        workdir.check_config(words())


def test_what_is_frozen_is_said() -> None:
    config = words(freeze=("text",))
    spec = make_run_spec(config, SpecialTokens(), make_mesh(MeshConfig(), jax.devices()[:1]))
    count = sum(leaf.size for leaf in jax.tree.leaves(spec.definition.shapes["text"]))
    assert describe(spec)[0].endswith(f"parameters in {', '.join(spec.definition.parts)}; {count:,} frozen (text)")
