"""official -> ours -> official and ours -> official -> ours are equal to the byte, for every task and format."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from data_pipelines.tokenizers import SPECIAL_TOKENS, WordPieceTokenizer
from mplug2_jax.conversion import import_plan
from mplug2_jax.conversion.export_plan import plan_export
from mplug2_jax.conversion.export_weights import batch_groups, export, group_arrays
from mplug2_jax.conversion.files.open import open_source
from mplug2_jax.conversion.files.sources import DTYPES
from mplug2_jax.conversion.import_plan import plan_import
from mplug2_jax.conversion.import_weights import run_import
from mplug2_jax.conversion.layouts.identify import DetectedCheckpoint
from mplug2_jax.conversion.layouts.official import TASK_PARTS, default_fusion_start, map_official_names
from mplug2_jax.conversion.layouts.official_state import LEFTOVER_FILE, StateInfo, official_state
from mplug2_jax.conversion.report import read_report
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import model_config
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints, open_checkpoint
from mplug2_jax.training.checkpoint.metadata import DataPosition
from mplug2_jax.training.config import CheckpointConfig
from tests.close import assert_close
from tests.hugging_face import clip_model
from tests.weights import MemorySource, assert_same, official_config, official_file, read_tensors

CASES = [("caption", False), ("videoqa", False), ("videoqa", True)]


def small_state(*, teacher: bool) -> StateInfo:
    return official_state(official_config(), default_fusion_start(official_config()), teacher=teacher)


def read_arrays(workdir: Path) -> dict[tuple[str, ...], np.ndarray]:
    checkpoints, step = open_checkpoint(workdir)
    arrays = checkpoints.read_arrays(list(checkpoints.array_specs(step)), step)
    checkpoints.close()
    return arrays


def assert_equal_arrays(one: Path, other: Path) -> None:
    a, b = read_arrays(one), read_arrays(other)
    assert set(a) == set(b)
    for path, value in a.items():
        assert value.tobytes() == b[path].tobytes(), path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(("task", "teacher"), CASES)
def test_import_and_export_restore_the_file_to_the_byte(tmp_path: Path, task: str, teacher: bool, suffix: str) -> None:
    source = official_file(tmp_path / "source" / f"x{suffix}", official_config(), task=task, teacher=teacher)
    report = run_import(plan_import([source]), tmp_path / "ours")
    assert {row.disposition for row in report.rows} == {"converted", "tied", "preserved"}
    assert len(report.rows) == len(open_source(source).names())
    file = tmp_path / "back" / f"y{suffix}"
    exported = export(tmp_path / "ours", file)
    assert_same(source, file)
    assert open_source(file).names() == list(small_state(teacher=teacher))
    # Both reports have the same digests.
    hashes = {row.name: row.sha256 for row in report.rows}
    assert hashes == {row.name: row.sha256 for row in exported.rows}
    assert {p for row in report.rows for p in row.params} == {p for row in exported.rows for p in row.params}


def test_a_golden_round_trip_is_equal_to_the_byte(reference: Path, tmp_path: Path) -> None:
    """CLIP's text tower, the vision width and the file's order differ from the release's."""
    source = reference / "goldens" / "c1_fc" / "videoqa_weights.safetensors"
    run_import(plan_import([source]), tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back.safetensors")
    assert_same(source, tmp_path / "back.safetensors")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Import a question-answering model with its teacher."""
    folder = tmp_path_factory.mktemp("imported")
    source = official_file(folder / "source" / "x.safetensors", official_config(), teacher=True)
    run_import(plan_import([source]), folder / "ours")
    return folder


def test_export_and_import_restore_our_weights_to_the_byte(imported: Path, tmp_path: Path) -> None:
    export(imported / "ours", tmp_path / "hub")
    run_import(plan_import([tmp_path / "hub"]), tmp_path / "again")
    assert_equal_arrays(imported / "ours", tmp_path / "again")


def test_without_leftover_tensors_the_export_initializes_them_and_reports_it(imported: Path, tmp_path: Path) -> None:
    (imported / "ours" / LEFTOVER_FILE).rename(tmp_path / "elsewhere")
    try:
        report = export(imported / "ours", tmp_path / "filled.safetensors")
    finally:
        (tmp_path / "elsewhere").rename(imported / "ours" / LEFTOVER_FILE)
    assert {row.disposition for row in report.rows} == {"converted", "tied", "filled"}
    source = open_source(tmp_path / "filled.safetensors")
    assert {name: source.info(name) for name in source.names()} == small_state(teacher=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_round_and_the_report_says_by_how_much(imported: Path, tmp_path: Path, dtype: str) -> None:
    report = export(imported / "ours", tmp_path / "x.safetensors", dtype=dtype)
    stored, original = read_tensors(tmp_path / "x.safetensors"), read_tensors(imported / "source" / "x.safetensors")
    rows = {row.name: row for row in report.rows}
    for name, value in original.items():
        if value.dtype == np.int64:
            assert stored[name].dtype == np.int64
            continue
        rounded = value.astype({"float16": DTYPES["F16"], "bfloat16": DTYPES["BF16"]}[dtype])
        assert stored[name].tobytes() == rounded.tobytes()
        if rows[name].disposition == "converted":
            difference = np.abs(value.astype(np.float64) - rounded.astype(np.float64)).max()
            assert rows[name].max_difference == difference > 0


def test_averaged_weights_can_replace_the_model_s_own(imported: Path, tmp_path: Path) -> None:
    export(imported / "ours", tmp_path / "x.safetensors", ema=True, teacher=False)
    stored, original = read_tensors(tmp_path / "x.safetensors"), read_tensors(imported / "source" / "x.safetensors")
    name = "text_decoder.bert.encoder.layer.1.output.dense.weight"
    assert stored[name].tobytes() == original[name.replace("text_decoder.", "text_decoder_m.")].tobytes()
    assert not any(name.startswith("text_decoder_m.") for name in stored)


def test_a_run_s_average_is_exported_by_default_with_frozen_parameters_as_they_are(tmp_path: Path) -> None:
    source = official_file(tmp_path / "s" / "x.safetensors", official_config(), teacher=False)
    run_import(plan_import([source]), tmp_path / "imported")
    imported, step = open_checkpoint(tmp_path / "imported")
    identity = imported.model_metadata(step)
    params, _ = imported.restore_params(define_model(identity.config, identity.parts).shapes, step)
    imported.close()
    average = jax.tree.map(lambda x: x + 1, {part: tree for part, tree in params.items() if part != "decoder"})
    ours = Checkpoints(tmp_path / "ours" / "checkpoints", CheckpointConfig(), model=identity)
    ours.save({"params": params, "ema": average}, DataPosition(3, {}))
    ours.close()

    (tmp_path / "last").mkdir()
    report = export(tmp_path / "ours", tmp_path / "averaged.safetensors")
    assert report.kind.endswith("averaged weights")
    report = export(tmp_path / "ours", tmp_path / "last" / "x.safetensors", ema=False)
    assert not report.kind.endswith("averaged weights")
    averaged, last = (read_tensors(tmp_path / file) for file in ("averaged.safetensors", "last/x.safetensors"))
    original = read_tensors(source)
    moved, frozen = (f"{tower}.encoder.layer.1.output.dense.bias" for tower in ("text_encoder", "text_decoder.bert"))
    np.testing.assert_array_equal(averaged[moved], original[moved] + 1)
    np.testing.assert_array_equal(averaged[frozen], original[frozen])
    np.testing.assert_array_equal(last[moved], original[moved])


def test_an_export_without_a_teacher_can_repeat_the_student_for_the_release_s_training(tmp_path: Path) -> None:
    source = official_file(tmp_path / "s" / "x.safetensors", official_config(), teacher=False)
    run_import(plan_import([source]), tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "x.safetensors", teacher=True)
    stored = read_tensors(tmp_path / "x.safetensors")
    assert list(stored) == list(small_state(teacher=True))
    ignored, used = "visual_encoder.visual.proj", "text_encoder.encoder.layer.1.output.dense.bias"
    for name in (ignored, used, "visn_emb_norm.weight"):
        module, _, suffix = name.partition(".")
        assert stored[f"{module}_m.{suffix}"].tobytes() == stored[name].tobytes()


def test_large_files_are_sharded_with_an_index(imported: Path, tmp_path: Path) -> None:
    export(imported / "ours", tmp_path / "hub", shard_bytes=1_000_000)
    shards = sorted((tmp_path / "hub").glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(shard.stat().st_size < 1_200_000 for shard in shards[:-1])
    index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert_same(imported / "source" / "x.safetensors", tmp_path / "hub")


def test_only_the_position_table_is_resized(tmp_path: Path) -> None:
    source = official_file(tmp_path / "s" / "x.safetensors", official_config(image_size=32))
    report = run_import(plan_import([source], image_size=48), tmp_path / "ours")
    resized = [row.name for row in report.rows if row.disposition == "resized"]
    assert resized == ["visual_encoder.visual.positional_embedding"]
    table = read_arrays(tmp_path / "ours")["params", "vision", "positions"]
    stored = read_tensors(source)["visual_encoder.visual.positional_embedding"]
    assert table.shape == (37, 64)
    np.testing.assert_array_equal(table[0], stored[0])
    torch = pytest.importorskip("torch")
    grid = torch.from_numpy(stored[1:]).reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, (6, 6), mode="bilinear", align_corners=False)
    assert_close(table[1:], resized[0].permute(1, 2, 0).reshape(36, 64))


def test_arrays_that_share_tensors_are_grouped_and_small_groups_are_batched() -> None:
    model_def = define_model(official_config(), TASK_PARTS["videoqa"])
    name_mapping = map_official_names(model_def.config, model_def.parts, 2, teacher=True)
    groups = group_arrays(name_mapping.mappings)
    paths = [path for group, _ in groups for path in group]
    assert len(paths) == len(set(paths)) == len({mapping.path for mapping in name_mapping.mappings})
    names = {mapping.name for mapping in name_mapping.mappings}
    assert sorted(name for _, group in groups for name in group) == sorted(names)
    assert max(len(group) for group, _ in groups) == 3  # query, key, value
    batches = batch_groups(name_mapping.mappings, dict.fromkeys(paths, 2**20))
    assert len(batches) == -(-len(paths) // 128) or len(paths) < 384
    assert len(batch_groups(name_mapping.mappings, dict.fromkeys(paths, 2**28))) == len(groups)


@pytest.mark.parametrize(("task", "teacher"), [("caption", False), ("videoqa", True)])
def test_every_tensor_of_the_large_models_is_mapped(task: str, teacher: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses shapes only, without allocating the large model."""
    config = model_config("large")
    state = official_state(config, default_fusion_start(config), teacher=teacher)
    shapes_only = {name: np.broadcast_to(np.zeros((), info.dtype), info.shape) for name, info in state.items()}
    large = DetectedCheckpoint(Path("large.pth"), "official", "official mPLUG-2", MemorySource(shapes_only), "official")
    monkeypatch.setattr(import_plan, "identify", lambda path: large)
    plan = plan_import([large.path], task=task)
    assert plan.model_def.config.fusion_layers == 6
    assert not plan.initialized
    assert plan.model_def.num_params() == (621_853_498 if task == "caption" else 1_031_533_370)


def test_exporting_a_model_without_the_release_s_parts_names_the_missing_ones(tmp_path: Path) -> None:
    clip_model().save_pretrained(tmp_path / "clip")
    run_import(plan_import([tmp_path / "clip"]), tmp_path / "ours")
    with pytest.raises(UserError, match="has the parts vision; the release's caption model also needs temporal"):
        plan_export(tmp_path / "ours")


@pytest.mark.slow
def test_the_base_size_round_trip_is_equal_to_the_byte(tmp_path: Path) -> None:
    config = model_config("base")
    source = official_file(tmp_path / "s" / "x.safetensors", config, task="videoqa", settings=False)
    run_import(plan_import([source], task="videoqa"), tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back.safetensors")
    assert_same(source, tmp_path / "back.safetensors")
    assert read_report(tmp_path).totals()["converted"]["elements"] == 379_952_442


@pytest.mark.parametrize(("task", "shard_bytes"), [("caption", 10**9), ("videoqa", 300_000)])
def test_the_pytorch_runtime_opens_an_export(tmp_path: Path, task: str, shard_bytes: int) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed here")
    from mplug2_jax.conversion.torch_runtime import Caption, VideoQA

    source = official_file(tmp_path / "s" / "x.safetensors", official_config(), task=task)
    run_import(plan_import([source]), tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "hub", shard_bytes=shard_bytes)
    model = (Caption if task == "caption" else VideoQA).from_pretrained(tmp_path / "hub")
    stored = read_tensors(source)
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, torch.from_numpy(stored[name].copy())), name


@pytest.mark.parametrize(("task", "dtype"), [("caption", "float32"), ("videoqa", "float16")])
def test_both_frameworks_agree_on_every_tap_of_a_conversion(tmp_path: Path, task: str, dtype: str) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed here")
    activation = {"caption": "gelu", "videoqa": "quick_gelu"}[task]
    config = official_config(image_size=16, vision_activation=activation)
    source = official_file(tmp_path / "s" / "x.safetensors", config, task=task)
    plan = plan_import([source], image_size=24)
    report = run_import(plan, tmp_path / "ours", tokenizer=TOKENIZER.save(tmp_path / "tokenizer"), verify=True)
    exported = export(tmp_path / "ours", tmp_path / "hub", dtype=dtype, verify=True)
    for each in (report, exported):
        assert each.status == 0
        taps = {(c.path, c.tap) for c in each.comparisons}
        assert {("image", "vision/out"), ("video", "vision/block"), ("video", "logits")} <= taps
        (text,) = (c.text for c in each.comparisons if c.tap == "generated text")
        assert f"PyTorch generates {text!r}" in each.summary()
        assert any("exact GELU" in note for note in each.notes) == (activation == "gelu")
        assert (("video", "text/out") in taps) == (task == "videoqa")
        assert max(c.relative for c in each.comparisons) <= 1e-5
    settings = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"]) == (TOKENIZER.cls_id, TOKENIZER.sep_id)
    assert plan_import([tmp_path / "hub"]).model_def == plan.model_def


TOKENIZER = WordPieceTokenizer([*SPECIAL_TOKENS, *map(chr, range(97, 123)), "a red dot"])
"""A tokenizer whose begin and end ids are not BERT's."""


def test_an_export_with_wrong_begin_and_end_ids_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed here")
    from mplug2_jax.conversion import hub

    source = official_file(tmp_path / "s" / "x.safetensors", official_config(), task="caption")
    run_import(plan_import([source]), tmp_path / "ours", tokenizer=TOKENIZER.save(tmp_path / "tokenizer"))
    correct = hub.to_config_json
    monkeypatch.setattr(hub, "to_config_json", lambda *sizes, tokens, **fields: correct(*sizes, **fields))
    report = export(tmp_path / "ours", tmp_path / "hub", verify=True)  # with BERT's ids
    assert [c.tap for c in report.comparisons or () if not c.passed] == ["generated text"]
    assert report.status == 1


def test_a_wrong_conversion_is_detected_by_the_taps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed here")
    from mplug2_jax.conversion.layouts.tensor_mapping import TensorMapping

    source = official_file(tmp_path / "s" / "x.safetensors", official_config(), task="caption")
    correct = TensorMapping.to_param

    def wrong(self: TensorMapping, tensor: np.ndarray) -> np.ndarray:
        param = correct(self, tensor)
        return -param if self.path[-2:] == ("up", "kernel") and self.layer == 1 else param

    monkeypatch.setattr(TensorMapping, "to_param", wrong)
    report = run_import(plan_import([source]), tmp_path / "ours", verify=True)
    assert report.status == 1
    assert "taps differ; max relative difference" in report.summary()
