"""The evaluation loop: batch sizes change nothing, results are saved, invalid configs are errors."""

import dataclasses
import json
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_pipelines.bad_records import BadRecord
from data_pipelines.config import DataConfig, ExampleConfig, InstructionConfig, SourceConfig, VisualConfig
from data_pipelines.digitworld import IMAGE_LABELS, VIDEO_LABELS
from data_pipelines.examples import Example
from data_pipelines.loader import _BadRecordError
from data_pipelines.tokenizers import SPECIAL_TOKENS, WordPieceTokenizer
from mplug2_jax.cli.common import results_table
from mplug2_jax.errors import UserError
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.evaluation.loop import Evaluation
from mplug2_jax.evaluation.results import EvaluationResult, save_result
from mplug2_jax.evaluation.samples import Sample, SampleNeighbors
from mplug2_jax.metrics.classification import confusion_summary
from mplug2_jax.model.config import SpecialTokens, model_config
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.objectives.config import MlmConfig
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.tasks.base import TaskContext
from mplug2_jax.tasks.classify import score
from mplug2_jax.tasks.config import TasksConfig
from tests.close import assert_close

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENIZER = WordPieceTokenizer([*SPECIAL_TOKENS, "?", *LETTERS, *(f"##{letter}" for letter in LETTERS)])
CONTEXT = TaskContext(
    config=TasksConfig(mlm=MlmConfig(mask_rate=0.5)),
    tokens=SpecialTokens(begin=TOKENIZER.cls_id, end=TOKENIZER.sep_id, mask=TOKENIZER.mask_id),
)
MODEL = model_config(
    "tiny", dtype="float32", width=16, heads=2, mlp_width=16, vision_width=16, vision_layers=1, text_layers=0,
    universal_layers=1, fusion_layers=1, decoder_layers=1, num_latents=2, vocab_size=TOKENIZER.vocab_size,
    num_classes=2,
)  # fmt: skip
SENTENCES = ExampleConfig(text="sentence", text_length=24)
QUESTIONS = ExampleConfig(
    instructions={"question": InstructionConfig(templates=("{question}",))}, instruction_length=24, target_length=8
)
NAMED = ExampleConfig(
    instructions={"label": InstructionConfig(templates=("what is it?",))}, instruction_length=8, classes=IMAGE_LABELS
)
SEEING = ("vision", "temporal", "universal", "classifier")
SIZE = 20


def evaluation(task, parts, examples, *, batch_size=SIZE, kind="text", size=SIZE, samples=SIZE, mesh=None, clips=1):
    sources = {"digits": SourceConfig(kind=kind, split="heldout", max_records=size)}
    visual = VisualConfig(num_frames=3, num_clips=clips)
    data = DataConfig(sources=sources, visual=visual, examples=examples, batch_size=batch_size)
    config = EvaluationConfig(task=task, data=data, num_samples=samples)
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    return Evaluation(
        "held", config, define_model(MODEL, parts), CONTEXT, TOKENIZER, mesh or one, seed=0, recipe="a_recipe"
    )


def random_params(model_def):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: (rng.normal(size=s.shape) * 0.3).astype(np.float32), model_def.shapes)


@pytest.fixture(scope="module")
def results():
    """Run one evaluation in a single batch, in batches of 7 (the last has 6), and of 16 (the last has 4) on a mesh."""
    parts = ("text", "universal", "mlm")
    params = random_params(define_model(MODEL, parts))
    return {
        size: evaluation("mlm", parts, SENTENCES, batch_size=size, mesh=mesh).run(params, 3)
        for size, mesh in ((SIZE, None), (7, None), (16, make_mesh(MeshConfig(data=2, fsdp=4))))
    }


@pytest.mark.parametrize("size", [7, 16])
def test_neither_the_batch_size_nor_padding_nor_the_mesh_changes_what_is_predicted(results, size):
    whole, ours = results[SIZE], results[size]
    assert [sample.prediction for sample in ours.samples] == [sample.prediction for sample in whole.samples]
    assert [(s.category, s.example.key) for s in ours.samples] == [(s.category, s.example.key) for s in whole.samples]
    assert ours.metrics == whole.metrics
    assert ours.baselines == whole.baselines
    assert ours.confidence_intervals == whole.confidence_intervals
    assert ours.predictions == whole.predictions
    assert ours.num_examples == SIZE


ACTIONS = ExampleConfig(instructions={"label": InstructionConfig(templates=("",))}, classes=VIDEO_LABELS)


def actions(visual, *, batch_size=6, mesh=None, size=7, model=MODEL):
    sources = {"digits": SourceConfig(kind="video", split="heldout", max_records=size)}
    data = DataConfig(sources=sources, visual=visual, examples=ACTIONS, batch_size=batch_size)
    model_def = define_model(dataclasses.replace(model, num_classes=len(VIDEO_LABELS)), SEEING)
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    config = EvaluationConfig(task="classify", data=data)
    return Evaluation("held", config, model_def, CONTEXT, TOKENIZER, mesh or one, seed=0), model_def


def assert_same_predictions(ours, theirs):
    """Allow a difference in the last of the four digits to which scores are rounded."""
    assert [row | {"score": 0} for row in ours] == [row | {"score": 0} for row in theirs]
    assert_close([row["score"] for row in ours], [row["score"] for row in theirs], 1.5e-4, scale=1)


def test_the_probabilities_of_an_example_s_views_are_averaged(monkeypatch):
    """Any batch size and mesh gives the same; an example with one bad view is skipped."""
    visual = VisualConfig(num_frames=2, num_clips=3)
    ours, model_def = actions(visual)
    params = random_params(model_def)
    rows = [
        np.asarray(ours._predict(params, batch.arrays)["probabilities"]) for batch in ours._dataset.batches()
    ]  # a row for each view
    means = np.concatenate(rows)[:21].reshape(7, 3, -1).astype(np.float64).mean(1)
    scored = {}

    def record(predictions, *rest):
        scored.update(predictions)
        return score(predictions, *rest)

    monkeypatch.setattr(ours, "_score", record)
    whole = ours.run(params, 0)
    assert_close(scored["probabilities"], means)
    assert len({row.tobytes() for row in np.concatenate(rows)[:3]}) == 3
    assert whole.num_examples == 7
    for size, mesh in ((1, None), (16, make_mesh(MeshConfig(data=8)))):
        other = actions(visual, batch_size=size, mesh=mesh)[0].run(params, 0)
        assert (other.metrics, other.confidence_intervals) == (whole.metrics, whole.confidence_intervals)
        assert_same_predictions(other.predictions, whole.predictions)

    broken, _ = actions(visual)
    load = broken._dataset._builder.load
    broken._config = dataclasses.replace(
        broken._config, data=dataclasses.replace(broken._config.data, max_bad_fraction=1.0)
    )

    def fails(ref, view=0):
        if (ref.index, view) == (4, 1):
            raise _BadRecordError(BadRecord("digits", "4", "cut off"))
        return load(ref, view)

    monkeypatch.setattr(broken._dataset._builder, "load", fails)
    partial = broken.run(params, 0)
    assert partial.num_examples == 6
    assert partial.skipped == (BadRecord("digits", "4", "cut off"),)
    assert_same_predictions(partial.predictions, whole.predictions[:4] + whole.predictions[5:])


@pytest.mark.parametrize(("size", "mesh"), [(1, {}), (7, {}), (16, {}), (8, {"data": 8}), (16, {"data": 2, "fsdp": 2})])
def test_in_bfloat16_no_bit_of_a_prediction_depends_on_how_many_are_read_at_a_time(monkeypatch, size, mesh):
    given = []

    def record(predictions, *rest):
        given.append(predictions["probabilities"])
        return score(predictions, *rest)

    in_bfloat16 = dataclasses.replace(MODEL, dtype="bfloat16", num_classes=len(VIDEO_LABELS))
    for batch_size, axes in ((3, {}), (size, mesh)):
        devices = jax.devices()[: math.prod(axes.values())]
        on = make_mesh(MeshConfig(**axes), devices)
        ours, model_def = actions(
            VisualConfig(num_frames=2), model=in_bfloat16, batch_size=batch_size, mesh=on, size=21
        )
        monkeypatch.setattr(ours, "_score", record)
        ours.run(random_params(model_def), 0)
    assert len(np.unique(given[0])) > 20
    np.testing.assert_array_equal(*given)


def test_a_result_says_what_was_evaluated_and_when(results):
    result = results[7]
    assert (result.name, result.task, result.step) == ("held", "mlm", 3)
    assert set(result.metrics) == {"accuracy"}
    low, high = result.confidence_intervals["accuracy"]
    assert 0 <= low <= result.metrics["accuracy"] <= high <= 1
    first = [sample for sample in result.samples if sample.category == "first"]
    assert [row["key"] for row in result.predictions] == [sample.example.key for sample in first]
    assert len({sample.example.key for sample in first}) == SIZE
    assert all(sample.references == (sample.example.text,) for sample in result.samples)
    assert [row["reference"] for row in result.predictions] == [sample.example.text for sample in first]
    assert (result.recipe, result.formats) == ("a_recipe", ("digitworld",))


def test_num_samples_limits_the_samples_of_each_category(monkeypatch):
    few = evaluation("mlm", ("text", "universal", "mlm"), SENTENCES, samples=2, size=3, batch_size=4)
    output = {"ids": jnp.full((8, 24), 7), "masked": jnp.ones((8, 24), bool)}
    monkeypatch.setattr(few, "_predict", lambda params, batch: output)
    result = few.run({}, 0)
    assert [sample.category for sample in result.samples] == ["first", "first", "best", "worst"]
    assert result.num_examples == 3


def test_a_result_is_saved_as_json_with_images_of_its_samples(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "absl")
    clip = np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3)
    samples = (
        Sample(
            Example({"frames": clip}, "clip-1", text="t", instruction="q?", answers=("right", "also")),
            "wrong",
            0.25,
            "first",
            SampleNeighbors((("t", True), ("u", False)), clip[0], (False, True)),
        ),
        Sample(Example({}, "text-2", text="only text"), "said", 1.0, "best"),
    )
    predictions = (
        {"key": "clip-1", "instruction": "q?", "prediction": "wrong"},
        {"key": "é", "instruction": "", "prediction": "said"},
    )
    confusion = confusion_summary(np.asarray([1, 1]), np.asarray([0, 1]), ["a", "b"])
    result = EvaluationResult(
        "held", "answer", 70, 2, 1.5, {"accuracy": 0.5}, {"accuracy": 0.25}, samples, (), {"accuracy": (0.0, 1.0)},
        predictions, confusion, "msrvtt_qa", ("annotations",), ("spice",), ("so few",),
    )  # fmt: skip
    result.log()
    assert caplog.messages == ["evaluation held: so few"]
    assert ["held", "spice", "absent", "2"] in [line.split() for line in results_table([result]).splitlines()]
    path = save_result(result, tmp_path / "new" / "70")
    assert path == tmp_path / "new" / "70" / "held.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content == {
        "format_version": 2, "name": "held", "task": "answer", "step": 70, "num_examples": 2, "seconds": 1.5,
        "recipe": "msrvtt_qa", "formats": ["annotations"],
        "metrics": {"accuracy": 0.5}, "confidence_intervals": {"accuracy": [0.0, 1.0]}, "baselines": {"accuracy": 0.25},
        "absent": ["spice"], "warnings": ["so few"], "skipped": [],
        "samples": [
            {"key": "clip-1", "instruction": "q?", "text": "t", "prediction": "wrong", "references": ["right", "also"],
             "score": 0.25, "category": "first", "frames": "held-0.png",
             "nearest_texts": [{"text": "t", "correct": True}, {"text": "u", "correct": False}],
             "nearest_images": {"frames": "held-0-nearest.png", "correct": [False, True]}},
            {"key": "text-2", "instruction": "", "text": "only text", "prediction": "said", "references": ["only text"],
             "score": 1.0, "category": "best"},
        ],
        "confusion": {"classes": ["a", "b"], "counts": [[0, 1], [0, 1]]},
    }  # fmt: skip
    with Image.open(path.parent / "held-0.png") as strip:
        pixels = np.asarray(strip)
    # Both frames are side by side, enlarged threefold.
    np.testing.assert_array_equal(pixels[::3, ::3], np.concatenate(list(clip), axis=1))
    assert pixels.shape == (96, 192, 3)
    assert {p.name for p in path.parent.iterdir()} == {"held.json", "held.jsonl", "held-0.png", "held-0-nearest.png"}
    assert [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()] == list(predictions)


@pytest.mark.parametrize(
    ("task", "parts", "examples", "changes", "sentence"),
    [
        ("mlm", ("text", "universal"), SENTENCES, {}, "task 'mlm' needs the parts mlm, which this model lacks"),
        ("mlm", ("text", "mlm", "universal"), QUESTIONS, {"kind": "image"}, "task 'mlm' reads text, text_mask"),
        ("answer", ("text", "universal", "decoder"), QUESTIONS, {"kind": "image"}, "needs the parts fusion, vision"),
        ("answer", ("vision", "text", "universal", "fusion", "decoder"), QUESTIONS, {"kind": "video"},
         "needs the parts temporal"),
        ("answer", ("vision", "temporal", "text", "universal", "fusion", "decoder"), QUESTIONS,
         {"kind": "video", "clips": 2},
         "num_clips=2 and num_crops=1 are views whose probabilities are averaged, .*; for task 'answer' set both to 1"),
        ("stsb", ("vision", "text", "universal", "classifier"), NAMED, {"kind": "image"},
         r"task 'stsb' has 26 classes, but config\.model\.num_classes=\d; set that to 26"),
        ("mlm", ("text", "universal", "mlm"), SENTENCES, {"size": 0}, "is empty"),
        ("mlm", ("text", "universal", "mlm"), SENTENCES, {"mesh": 8}, "batch_size=20 does not split .* 16 or 24"),
    ],
)  # fmt: skip
def test_an_invalid_evaluation_is_an_error_before_anything_runs(task, parts, examples, changes, sentence):
    if "mesh" in changes:
        changes = {"mesh": make_mesh(MeshConfig(fsdp=changes["mesh"]))}
    with pytest.raises(UserError, match=sentence) as error:
        evaluation(task, parts, examples, **changes)
    assert str(error.value).startswith("config.evaluations.held")
