"""LoRA: what is trained and what stays, what the optimizer holds, and that all other code sees merged kernels."""

import argparse
import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from mplug2_jax.cli.common import restore_run
from mplug2_jax.conversion.export_weights import export
from mplug2_jax.conversion.files.open import open_source
from mplug2_jax.conversion.layouts.official import default_fusion_start, load_official
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import PARTS, model_config
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.planning.programs import abstract_batch
from mplug2_jax.training.checkpoint.checkpoints import open_checkpoint
from mplug2_jax.training.checkpoint.checksums import leaves_by_name as leaves
from mplug2_jax.training.config import CheckpointConfig, LoraConfig, OptimizerConfig, RunConfig
from mplug2_jax.training.initialization import init_or_load_state
from mplug2_jax.training.loop import describe, train
from mplug2_jax.training.optim.layer_decay import lr_scales
from mplug2_jax.training.optim.lora import adapter_shapes, add_adapters, remove_adapters
from mplug2_jax.training.optim.optimizer import is_decayed, is_vision
from mplug2_jax.training.optim.partition import part_name, partition
from mplug2_jax.training.state import eval_params
from mplug2_jax.training.telemetry.step_flops import count_gradient_flops
from tests.close import BFLOAT16, CHAIN, assert_close, assert_equal
from tests.runs import small_run
from tests.training.optim.partial_runs import DISTILLED, answer_run, make_spec, mlm_run, train_steps

LORA = LoraConfig(parts=("vision", "decoder"), rank=2, alpha=3.0)
TEXT = LoraConfig(parts=("text",), rank=3)


def merge_by_hand(base: Any, adapters: Any, scale: float) -> dict[str, Any]:
    """Return every parameter by name: the kernel in ``base`` plus the product of its adapter in ``adapters``."""
    adapter_leaves, merged = leaves(adapters), {}
    for name, leaf in leaves(remove_adapters(base)).items():
        a, b = (adapter_leaves.get(name.removesuffix("kernel") + f"lora/{factor}") for factor in "ab")
        value = np.asarray(leaf if a is not None or name not in adapter_leaves else adapter_leaves[name])
        merged[name] = value if a is None else value + scale * np.einsum("...ir,...ro->...io", a, b)
    return merged


def test_the_linear_kernels_of_a_part_alone_have_adapters() -> None:
    model_def = define_model(model_config("tiny", num_classes=2, vision_width=64), tuple(PARTS))
    kernels = {
        name: leaf
        for name, leaf in leaves(model_def.shapes).items()
        if name.endswith("/kernel") and not name.endswith(("temporal_1/kernel", "temporal_2/kernel"))
    }
    for part in PARTS:
        config = LoraConfig(parts=(part,), rank=3)
        shapes = add_adapters(model_def.shapes, config.parts, adapter_shapes(config))
        assert remove_adapters(shapes) == model_def.shapes
        added = leaves(shapes).keys() - leaves(model_def.shapes).keys()
        adapter_leaves = {name: leaf for name, leaf in kernels.items() if part_name(tuple(name.split("/"))) == part}
        assert adapter_leaves
        assert len(added) == 2 * len(adapter_leaves)
        assert added == {name.replace("kernel", f"lora/{factor}") for name in adapter_leaves for factor in "ab"}
        for name, kernel in adapter_leaves.items():
            a, b = (leaves(shapes)[name.replace("kernel", f"lora/{factor}")] for factor in "ab")
            assert a.shape == (*kernel.shape[:-1], 3)
            assert b.shape == (*kernel.shape[:-2], 3, kernel.shape[-1])


@pytest.mark.parametrize(
    "config",
    [answer_run(lora=LORA, ema_decay=0.5), mlm_run(lora=TEXT, param_dtype="bfloat16")],
    ids=["averaged", "short"],
)
@pytest.mark.slow
def test_a_run_begins_with_the_model_without_lora(config: RunConfig) -> None:
    spec, without_lora = make_spec(config), make_spec(dataclasses.replace(config, lora=LoraConfig()))
    state = spec.init()
    params = eval_params(spec, state)
    is_bfloat16 = config.param_dtype == "bfloat16"
    assert_close(params, without_lora.init()["params"], BFLOAT16 if is_bfloat16 else 1e-5)
    shapes = jax.tree.map(lambda x: (x.shape, x.sharding), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.sharding), spec.eval_param_shapes)
    for name, leaf in leaves(state["params"]).items():
        if "/lora/" in name:
            assert leaf.dtype.name == "float32"
            spread = float(leaf.std()) * (leaf.shape[-2] ** 0.5)
            assert spread == 0 if name.endswith("b") else 0.5 < spread < 2


@pytest.mark.parametrize(
    ("config", "mesh"),
    [
        (answer_run(lora=LORA, freeze=("fusion",)), MeshConfig(fsdp=1)),
        (mlm_run(lora=TEXT, grad_accum_steps=2, fsdp_gather="step", ema_decay=0.5), MeshConfig(fsdp=2)),
        (mlm_run(lora=TEXT, param_dtype="bfloat16", tasks=DISTILLED), MeshConfig(fsdp=1)),
    ],
    ids=["clips", "gathered once", "distilled"],
)
@pytest.mark.slow
def test_adapters_and_other_parts_are_trained_and_frozen_parameters_stay_to_the_bit(
    config: RunConfig, mesh: MeshConfig
) -> None:
    start, state, metrics = train_steps(config, 3, mesh)
    trainable = set()
    for name, leaf in leaves(state["params"]).items():
        same = np.array_equal(leaf, leaves(start)[name])
        if "/lora/" in name or part_name(tuple(name.split("/"))) not in config.frozen:
            trainable.add(name)
            if name.endswith(("kernel", "/a", "/b")):
                assert not same, name
        else:
            assert same, name
    assert {name for name in trainable if "/lora/" in name}
    assert metrics["skipped"] == 0
    # The optimizer and the EMA hold nothing else.
    moments = state["opt"][0 if config.optimizer.clip_norm == 0 else 1]
    for tree in (moments.mu, moments.nu, *([state["ema"]] if "ema" in state else [])):
        assert leaves(tree).keys() == trainable
    if "teacher" in state:
        assert leaves(state["teacher"]).keys() == leaves(remove_adapters(state["params"])).keys()


@pytest.mark.slow
def test_a_teacher_follows_the_merged_kernels() -> None:
    start, state, _ = train_steps(mlm_run(lora=TEXT, tasks=DISTILLED), 2)
    # It is updated before each step: unchanged by the first, and by the second halfway to the first step's result.
    _, one_step, _ = train_steps(mlm_run(lora=TEXT, tasks=DISTILLED), 1)
    base, student = (merge_by_hand(tree, tree, TEXT.scale) for tree in (start, one_step["params"]))
    assert_close(leaves(state["teacher"]), {name: 0.5 * base[name] + 0.5 * student[name] for name in base})


@pytest.mark.slow
def test_an_adapter_s_gradient_is_its_kernel_s_by_the_chain_rule() -> None:
    """That of b; a has none while b is zero."""
    start, with_lora, _ = train_steps(mlm_run(lora=TEXT), 1)
    _, full, _ = train_steps(mlm_run(), 1)
    adapters, kernels = leaves(with_lora["opt"][0].mu), leaves(full["opt"][0].mu)
    names = {name for name in adapters if name.endswith("/lora/b")}
    assert len(names) == 6
    for name in names:
        kernel = np.asarray(kernels[name.replace("lora/b", "kernel")])
        a = leaves(start)[name.replace("lora/b", "lora/a")]
        expected = TEXT.scale * np.einsum("...ir,...io->...ro", a, kernel)
        assert_close(adapters[name], expected, CHAIN)
        assert not np.any(adapters[name.replace("lora/b", "lora/a")])


@pytest.mark.slow
def test_the_mesh_changes_nothing_and_the_rank_is_not_sharded() -> None:
    # A large eps keeps updates by gradients that are rounding noise negligible.
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.5, clip_norm=0.0, eps=1e-2)
    config = mlm_run(lora=LoraConfig(parts=("text", "universal"), rank=4), optimizer=optimizer)
    mesh = MeshConfig(fsdp=2, tensor=2)
    _, single, _ = train_steps(config, 3)
    for gather in ("layer", "step"):
        _, state, _ = train_steps(dataclasses.replace(config, fsdp_gather=gather), 3, mesh)
        assert_close(state["params"], single["params"], CHAIN)
    up = state["params"]["text"]["layers"]["mlp"]["up"]
    assert tuple(up["kernel"].sharding.spec) == (None, "fsdp", "tensor")
    assert tuple(up["lora"]["a"].sharding.spec) == (None, "fsdp", None)
    assert tuple(up["lora"]["b"].sharding.spec) == (None, None, "tensor")
    params = eval_params(make_spec(config, mesh), state)
    assert params["text"]["layers"]["mlp"]["up"]["kernel"].sharding == up["kernel"].sharding


def test_parameter_groups_go_by_the_adapter_s_path() -> None:
    spec = make_spec(answer_run(lora=LORA))
    paths = [tuple(name.split("/")) for name in leaves(spec.shapes["params"]) if "/lora/" in name]
    assert {path[0] for path in paths if is_vision(path)} == {"vision"}
    assert all(is_decayed(path, "kernels") and is_decayed(path, "released") for path in paths)
    scales = leaves(lr_scales(spec.shapes["params"], spec.config.model, 0.5))
    for path in paths:
        np.testing.assert_array_equal(scales["/".join(path)], scales["/".join((*path[:-2], "kernel"))])
    spec = make_spec(answer_run(lora=LORA, optimizer=OptimizerConfig(layer_decay=0.5)))
    trainable, _ = partition(spec.shapes["params"], spec.config.frozen)
    # There is a scale for each, and no other.
    jax.eval_shape(spec.optimizer.update, trainable, spec.shapes["opt"], trainable)


def test_lora_saves_no_flops() -> None:
    specs = [make_spec(mlm_run(lora=lora)) for lora in (LoraConfig(), TEXT)]
    batches = {"text": abstract_batch(specs[0].config.streams["text"].data, specs[0])}
    full, with_lora = (count_gradient_flops(spec, spec.config.streams, batches, remat=False) for spec in specs)
    assert with_lora["lora"] > 0
    assert [with_lora[part] for part in ("text", "universal")] == [full[part] for part in ("text", "universal")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    """Return a run of four steps with checkpoints of the second and the last, an EMA and an evaluation."""
    evaluations = small_run().evaluations
    config = answer_run(lora=LORA, ema_decay=0.5, evaluations=evaluations, checkpoint=CheckpointConfig(every_steps=2))
    path = tmp_path_factory.mktemp("lora") / "run"
    train(config, path)
    return path, config


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return all arrays of a work directory's last checkpoint, by tree."""
    checkpoints, step = open_checkpoint(path)
    paths = [path for path in checkpoints.array_specs(step) if path[0] in ("params", "ema")]
    trees: dict[str, Any] = unflatten_dict(checkpoints.read_arrays(paths))
    checkpoints.close()
    return trees


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(run: tuple[Path, RunConfig], tmp_path: Path) -> None:
    path, config = run
    copy = tmp_path / "again"
    shutil.copytree(path, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    results = train(config, copy)
    assert_equal(read_checkpoint(copy), read_checkpoint(path))
    assert {result.step for result in results} == {4}
    with pytest.raises(UserError, match=r"lora\.rank was 2 and is 4\. Use the same config to resume it"):
        train(dataclasses.replace(config, lora=dataclasses.replace(LORA, rank=4)), copy)


@pytest.mark.slow
def test_commands_open_merged_kernels(run: tuple[Path, RunConfig]) -> None:
    path, _ = run
    trees = read_checkpoint(path)
    for overrides, tree in (((), "ema"), (("--config.ema_decay=0",), "params")):
        spec, params, _, _ = restore_run(argparse.Namespace(workdir=path, step=None, overrides=list(overrides)))
        assert_close(leaves(params), merge_by_hand(trees["params"], trees[tree], 1.5))
        assert params["decoder"]["head"]["dense"]["kernel"].sharding == (
            spec.shapes["params"]["decoder"]["head"]["dense"]["kernel"].sharding
        )


@pytest.mark.slow
@pytest.mark.parametrize(("ema", "tree"), [(None, "ema"), (False, "params")])
def test_an_export_has_the_merged_kernels(
    run: tuple[Path, RunConfig], tmp_path: Path, ema: bool | None, tree: str
) -> None:
    path, config = run
    export(path, tmp_path / "x.safetensors", ema=ema)
    model_def = make_spec(config).model_def
    source = open_source(tmp_path / "x.safetensors")
    params, _ = load_official(source, model_def, default_fusion_start(config.model))
    trees = read_checkpoint(path)
    expected = merge_by_hand(trees["params"], trees[tree], 1.5)
    assert_close(leaves(params), expected)
    name = "decoder/layers/mlp/up/kernel"
    assert np.abs(expected[name] - leaves(trees["params"])[name]).max() > 1e-3


@pytest.mark.slow
def test_a_run_is_initialized_from_merged_kernels_with_or_without_its_own_adapters(
    run: tuple[Path, RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="absl")
    path, _ = run
    trees = read_checkpoint(path)
    expected = merge_by_hand(trees["params"], trees["ema"], 1.5)
    plain = answer_run(init_from=str(path), tasks=DISTILLED)
    state = init_or_load_state(make_spec(plain))
    assert f"initializing from {path} (step 4, EMA weights, LoRA merged): decoder, fusion, " in caplog.text
    for tree in ("params", "teacher"):
        assert_close(leaves(state[tree]), expected)
    spec = make_spec(answer_run(init_from=str(path), lora=LoraConfig(parts=("decoder",), rank=5)))
    state = init_or_load_state(spec)
    assert_close(leaves(remove_adapters(state["params"])), expected)
    assert_close(leaves(eval_params(spec, state)), expected)
    assert state["params"]["decoder"]["head"]["dense"]["lora"]["a"].shape == (32, 5)


@pytest.mark.parametrize(
    ("lora", "freeze", "message"),
    [
        ({"parts": ("viscon",)}, (), r"config\.lora\.parts names 'viscon': did you mean 'vision'\?"),
        ({"parts": ("mlm",)}, (), r"config\.lora\.parts names 'mlm': valid: decoder, fusion, temporal, text, "),
        ({"parts": ("vision",)}, ("vision",), r"config\.freeze and config\.lora\.parts both name 'vision', which"),
        ({"rank": 0}, (), r"config\.lora\.rank=0 must be at least 1"),
        ({"alpha": 0.0}, (), r"config\.lora\.alpha=0\.0 must be at least 0\.001"),
    ],
)
def test_invalid_lora_configs_are_refused(lora: dict[str, Any], freeze: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        answer_run(lora=LoraConfig(**lora), freeze=freeze)


def test_the_summary_names_adapters() -> None:
    spec = make_spec(mlm_run(lora=TEXT))
    frozen, adapters = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (spec.model_def.shapes["text"], partition(spec.shapes["params"], ("text",))[0]["text"])
    )
    assert describe(spec)[0].endswith(f"; {frozen:,} frozen (text); LoRA adds {adapters:,} (text)")
