"""Freezing: frozen parameters stay to the bit and cost no moments and no gradients; others train as before."""

from pathlib import Path

import jax
import numpy as np
import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.model.config import PARTS, SpecialTokens, model_config
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.planning.programs import abstract_batch
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints
from mplug2_jax.training.checkpoint.checksums import leaves_by_name as leaves
from mplug2_jax.training.checkpoint.metadata import DataPosition
from mplug2_jax.training.config import CheckpointConfig, RunConfig
from mplug2_jax.training.loop import describe
from mplug2_jax.training.optim.partition import combine, part_name, partition
from mplug2_jax.training.state import make_run_spec
from mplug2_jax.training.step import jit_train_step
from mplug2_jax.training.telemetry.step_flops import count_gradient_flops
from mplug2_jax.training.workdir import WorkDir
from tests.close import CHAIN, assert_close
from tests.training.optim.partial_runs import DISTILLED, answer_run, make_spec, mlm_run, train_steps


def test_partition_splits_by_part_and_combine_undoes_it() -> None:
    shapes = define_model(model_config("tiny", num_classes=2, vision_width=64), tuple(PARTS)).shapes
    names = {part_name(tuple(name.split("/"))) for name in leaves(shapes)}
    assert names == {*PARTS, "vision_projection"}
    for frozen in ((), ("vision",), ("temporal",), ("vision", "temporal", "mlm"), tuple(PARTS)):
        trained, frozen_params = partition(shapes, frozen)
        assert {part_name(tuple(name.split("/"))) for name in leaves(frozen_params)} == set(frozen)
        assert leaves(trained).keys() | leaves(frozen_params).keys() == leaves(shapes).keys()
        assert not leaves(trained).keys() & leaves(frozen_params).keys()
        assert combine(trained, frozen_params) == combine(frozen_params, trained) == shapes
    trained, frozen_params = partition(shapes, ("vision",))
    assert set(trained["vision"]["blocks"]) == {"temporal_1", "temporal_2"}
    assert partition(shapes, ("vision", "temporal"))[0].keys() == shapes.keys() - {"vision"}


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (("viscon",), r"config\.freeze names 'viscon': did you mean 'vision'\?"),
        (("mlm",), r"config\.freeze names 'mlm': valid: decoder, fusion, temporal, text, universal, vision"),
        (("vision", "temporal", "text", "universal", "fusion", "decoder"), "leaves nothing to train"),
    ],
)
def test_parts_that_cannot_be_frozen_are_refused(frozen: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        answer_run(freeze=frozen)


@pytest.mark.parametrize(
    ("config", "devices"),
    [
        (answer_run(freeze=("vision", "text")), 1),
        (mlm_run(freeze=("text",), grad_accum_steps=2, fsdp_gather="step"), 2),
        (mlm_run(freeze=("mlm",), param_dtype="bfloat16", tasks=DISTILLED), 1),
    ],
    ids=["clips", "gathered once", "distilled"],
)
@pytest.mark.slow
def test_frozen_parameters_stay_to_the_bit_and_others_change(config: RunConfig, devices: int) -> None:
    start, state, metrics = train_steps(config, 3, MeshConfig(fsdp=devices))
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
def test_gradients_above_and_below_a_frozen_part_are_unchanged() -> None:
    full, with_frozen = (train_steps(mlm_run(freeze=parts), 1)[1]["opt"][0].mu for parts in ((), ("universal",)))
    assert with_frozen.keys() == {"text", "mlm"}
    for part in with_frozen:
        assert_close(with_frozen[part], full[part], CHAIN)
        assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(with_frozen[part])) > 1e-4


def flops(*frozen: str) -> float:
    spec = make_spec(mlm_run(freeze=frozen))
    batches = {name: abstract_batch(stream.data, spec) for name, stream in spec.config.streams.items()}
    with jax.set_mesh(spec.mesh):
        analysis = jit_train_step(spec).lower(spec.shapes, batches, spec.hyperparam_shapes).compile().cost_analysis()
    return analysis["flops"]


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_backward_pass_costs_less() -> None:
    """Layers below the lowest trained one have none; frozen layers above it have none for their weights."""
    full, middle, bottom = flops(), flops("universal"), flops("text", "universal")
    assert bottom < 0.9 * middle
    assert middle < 0.9 * full


@pytest.mark.slow
def test_flops_are_counted_without_frozen_gradients() -> None:
    specs = [make_spec(answer_run(freeze=frozen)) for frozen in ((), ("vision", "temporal"))]
    batches = {"clips": abstract_batch(specs[0].config.streams["clips"].data, specs[0])}
    full, with_frozen = (count_gradient_flops(spec, spec.config.streams, batches, remat=False) for spec in specs)
    assert with_frozen["vision"] < 0.4 * full["vision"]  # forward alone
    assert with_frozen["decoder"] == full["decoder"]


def test_a_frozen_layer_below_a_trained_head_counts_twice_and_not_three_times() -> None:
    specs = [make_spec(mlm_run(freeze=frozen)) for frozen in ((), ("universal",))]
    batches = {"text": abstract_batch(specs[0].config.streams["text"].data, specs[0])}
    full, with_frozen = (count_gradient_flops(spec, spec.config.streams, batches, remat=False) for spec in specs)
    assert {part for part in full if full[part] != with_frozen[part]} == {"universal"}
    assert with_frozen["universal"] < 0.75 * full["universal"]


def test_a_run_resumes_and_not_with_another_frozen_part(tmp_path: Path) -> None:
    config = mlm_run(freeze=("text",))
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
        workdir.check_config(mlm_run())


def test_the_summary_names_frozen_parts() -> None:
    config = mlm_run(freeze=("text",))
    spec = make_run_spec(config, SpecialTokens(), make_mesh(MeshConfig(), jax.devices()[:1]))
    count = sum(leaf.size for leaf in jax.tree.leaves(spec.model_def.shapes["text"]))
    assert describe(spec)[0].endswith(f"parameters in {', '.join(spec.model_def.parts)}; {count:,} frozen (text)")
