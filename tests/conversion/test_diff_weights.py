"""``convert diff``: equal checkpoints are equal in whatever form, and every difference is found and measured."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from mplug2_jax.conversion.diff_weights import compare_values, diff_checkpoints
from mplug2_jax.conversion.export_weights import export
from mplug2_jax.conversion.files.sources import DTYPES, HostArray
from mplug2_jax.conversion.import_plan import plan_import
from mplug2_jax.conversion.import_weights import run_import
from mplug2_jax.conversion.layouts.official import TASK_PARTS
from mplug2_jax.errors import UserError
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.model.prng import random_key
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints, open_checkpoint
from mplug2_jax.training.checkpoint.metadata import DataPosition, ModelMetadata
from mplug2_jax.training.config import CheckpointConfig
from tests.pages import Elements
from tests.weights import (
    bert_tensors,
    hugging_face_clip,
    official_config,
    official_file,
    openai_clip,
    read_tensors,
    write_checkpoint,
)

BIAS = "text_encoder.encoder.layer.1.output.dense.bias"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an official question-answering checkpoint with its teacher."""
    return official_file(tmp_path_factory.mktemp("source") / "x.safetensors", official_config(), teacher=True)


@pytest.fixture(scope="module")
def imported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Import it."""
    folder = tmp_path_factory.mktemp("imported") / "ours"
    run_import(plan_import([source]), folder)
    return folder


def change(source: Path, to: Path, edit: Callable[[dict[str, HostArray]], None]) -> Path:
    """Write a copy with changed tensors."""
    tensors = {name: value.copy() for name, value in read_tensors(source).items()}
    edit(tensors)
    return write_checkpoint(to, tensors, {"config.json": json.loads(source.with_name("config.json").read_text())})


def test_our_checkpoint_equals_its_source_its_export_and_itself(source: Path, imported: Path, tmp_path: Path) -> None:
    export(imported, tmp_path / "x.pth")
    names = len(read_tensors(source))
    for a, b in ((imported, source), (tmp_path / "x.pth", imported), (source, tmp_path / "x.pth")):
        diff = diff_checkpoints(a, b)
        assert (diff.status, diff.counts) == (0, (names, 0, 0, 0))
        assert diff.summary().endswith(f"\nall {names} tensors are equal")
    diff = diff_checkpoints(imported, imported / "checkpoints" / "0")
    assert (diff.status, diff.counts[1:]) == (0, (0, 0, 0))
    assert {"vision", "decoder", "vision (teacher)"} <= set(diff.towers)


def test_differences_are_measured_and_the_largest_are_named(source: Path, imported: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, HostArray]) -> None:
        tensors[BIAS][3] += 0.5
        tensors["visn_emb_norm.bias"] = tensors["visn_emb_norm.bias"].astype(np.float16)
        tensors["visual_encoder.logit_scale"] = np.zeros(2, np.float32)
        tensors["visual_encoder.visual.ln_pre.bias"][0] = np.nan
        del tensors["fusion_encoder.embeddings.LayerNorm.bias"]

    changed = change(source, tmp_path / "y.safetensors", edit)
    original = read_tensors(source)
    diff = diff_checkpoints(imported, changed)
    assert diff.status == 1
    assert diff.counts == (len(original) - 5, 4, 1, 0)
    (bias,) = diff.towers["text_encoder"].differing
    after = read_tensors(changed)[BIAS]
    absolute = float(after[3].astype(np.float64) - original[BIAS][3])
    assert bias.absolute == absolute
    assert bias.relative == absolute / float(np.abs([original[BIAS], after]).max())
    shape, nan = diff.towers["visual_encoder"].differing
    assert (shape.name, shape.shapes, shape.absolute) == ("visual_encoder.logit_scale", ((), (2,)), None)
    assert nan.absolute == nan.relative == np.inf
    (rounded,) = diff.towers["visn_emb_norm"].differing
    assert rounded.dtypes == ("float32", "float16")
    assert 0 < (rounded.relative or 0) < 1e-3
    assert diff.towers["fusion_encoder"].only == (["fusion_encoder.embeddings.LayerNorm.bias"], [])
    summary = diff.summary()
    assert f"{BIAS} differs: by 5.0e-01, " in summary
    assert "visual_encoder.logit_scale differs: scalar and 2" in summary
    assert summary.endswith(f"\n{len(original) - 5} equal, 4 differ, 1 only in A, 0 only in B")
    content = json.loads(diff.to_json())
    assert content["equal"] is False
    assert [t["absolute"] for t in content["towers"]["visual_encoder"]["differing"]] == [None, "inf"]
    opposite = diff_checkpoints(changed, imported)
    assert opposite.counts == (len(original) - 5, 4, 0, 1)
    assert opposite.towers["text_encoder"].differing[0].relative == bias.relative


def test_two_of_our_checkpoints_are_compared_by_part_without_the_optimizer(imported: Path, tmp_path: Path) -> None:
    opened, step = open_checkpoint(imported)
    model = opened.model_metadata(step)
    state = opened.read_arrays(list(opened.array_specs(step)), step)
    opened.close()
    kernel = ("params", "text", "layers", "mlp", "up", "kernel")
    state = {path: array + (path == kernel) for path, array in state.items() if path[:2] != ("teacher", "fusion")}
    saved = Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig(), model=model)
    saved.save(unflatten_dict(state) | {"opt": {"count": np.zeros(2, np.float32)}}, DataPosition(3, {}))
    saved.close()
    diff = diff_checkpoints(imported, tmp_path / "run")
    assert [tensor.name for tower in diff.towers.values() for tensor in tower.differing] == ["/".join(kernel)]
    assert diff.towers["text"].differing[0].absolute == pytest.approx(1.0, abs=1e-6)
    only_a, only_b = diff.towers["fusion (teacher)"].only
    assert only_a
    assert diff.counts[2:] == (len(only_a), 0)
    assert not only_b


def test_a_run_with_an_average_and_a_head_of_its_own_equals_its_export(tmp_path: Path) -> None:
    model_def = define_model(official_config(), (*TASK_PARTS["videoqa"], "contrastive"))
    params = jax.tree.map(np.asarray, jax.jit(model_def.init)(random_key(0)))
    average = jax.tree.map(lambda x: np.asarray(x + 1), {p: tree for p, tree in params.items() if p != "decoder"})
    model = ModelMetadata(model_def.config, model_def.parts, {})
    saved = Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig(), model=model)
    saved.save({"params": params, "ema": average}, DataPosition(3, {}))
    saved.close()
    export(tmp_path / "run", tmp_path / "averaged" / "x.safetensors")
    diff = diff_checkpoints(tmp_path / "run", tmp_path / "averaged" / "x.safetensors")
    assert diff.status == 0
    assert diff.sides[0].title == (
        "checkpoint of step 3, as official videoqa, averaged weights, which has no contrastive"
    )
    assert "has the parts" not in diff.summary()
    export(tmp_path / "run", tmp_path / "last" / "x.safetensors", ema=False)
    diff = diff_checkpoints(tmp_path / "run", tmp_path / "last" / "x.safetensors")
    assert diff.status == 1
    assert {name for name, tower in diff.towers.items() if tower.differing} == {
        "visn_emb_norm", "visual_encoder", "text_encoder", "fusion_encoder"
    }  # fmt: skip


def test_a_page_escapes_names(tmp_path: Path) -> None:
    tensors = bert_tensors(64, 1)
    a = write_checkpoint(tmp_path / "a.safetensors", tensors)
    b = write_checkpoint(tmp_path / "<b>.safetensors", tensors | {"<script>": np.zeros(2, np.float32)})
    diff = diff_checkpoints(a, b)
    assert diff.only_parts == ([], [])
    assert diff.counts == (len(tensors), 0, 0, 1)
    page = Elements(diff.to_html())
    assert not page.open
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert "only in B" in page.text
    assert "<script>" in page.text
    assert "Two checkpoints are equal" in Elements(diff_checkpoints(a, a).to_html()).text


def test_parts_of_one_only_are_named(tmp_path: Path) -> None:
    tensors = bert_tensors(64, 1)
    head = {f"cls.predictions.transform.{name}": np.zeros(4, np.float32) for name in ("dense.weight", "dense.bias")}
    a = write_checkpoint(tmp_path / "a.safetensors", tensors | head)
    diff = diff_checkpoints(a, write_checkpoint(tmp_path / "b.pth", tensors))
    assert diff.only_parts == (["mlm"], [])
    assert "only A has the parts mlm" in diff.summary()
    assert diff.towers["cls"].only == (list(head), [])


def test_checkpoints_of_different_layouts_are_an_error_with_a_remedy(tmp_path: Path) -> None:
    clip = write_checkpoint(tmp_path / "clip.pth", openai_clip(64, 1))
    other = write_checkpoint(tmp_path / "hf" / "model.safetensors", hugging_face_clip(64, 1))
    with pytest.raises(UserError, match=r"have no tensor in common.*import both and compare the imports"):
        diff_checkpoints(clip, other)
    for name, path in (("a", clip), ("b", other)):
        run_import(plan_import([path]), tmp_path / name)
    assert diff_checkpoints(tmp_path / "a", tmp_path / "b").counts[2:] == (0, 0)
    with pytest.raises(UserError, match="have no tensor in common"):
        diff_checkpoints(clip, tmp_path / "a")


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, -4.0], [1.0, -4.0], (0.0, 0.0)),
        ([1.0, -4.0], [2.0, -4.0], (1.0, 0.25)),
        ([0.0, 0.0], [0.0, 2.0], (2.0, 1.0)),
        ([np.nan, 1.0], [np.nan, 1.0], (0.0, 0.0)),
        ([np.inf, 1.0], [np.inf, 3.0], (2.0, 2 / 3)),
        ([np.nan, 1.0], [0.0, 1.0], (np.inf, np.inf)),
        ([np.inf, 1.0], [-np.inf, 1.0], (np.inf, np.inf)),
        ([], [], (0.0, 0.0)),
    ],
)
def test_values_are_compared_on_their_own_scale(
    a: list[float], b: list[float], expected: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mplug2_jax.conversion.diff_weights._CHUNK", 1)
    assert compare_values(np.array(a, np.float32), np.array(b, np.float32)) == pytest.approx(expected)
    rounded = compare_values(np.array(a, DTYPES["BF16"]), np.array(b, np.float32))
    assert rounded == pytest.approx(expected)
