"""Every task: required parts and keys, losses, predictions and scores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.examples import Example
from mplug2_jax.errors import UserError
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.metrics.java_metrics import Meteor
from mplug2_jax.metrics.metric import MeanMetric
from mplug2_jax.metrics.units import is_fraction
from mplug2_jax.model.config import PARTS, SpecialTokens, model_config
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.objectives.config import MlmConfig, VlmConfig
from mplug2_jax.objectives.forward import ForwardPass
from mplug2_jax.tasks import answer, caption, classify, mlm, vlc
from mplug2_jax.tasks.base import EvalOutput, Prompts, TaskContext
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.tasks.glue import TASKS as GLUE
from mplug2_jax.tasks.specs import SIMILARITY_LEVELS, TASK_SPECS, required_parts
from mplug2_jax.tasks.table import TASKS

BATCH, LENGTH, VOCABULARY = 4, 5, 16
CONFIG = model_config(
    "tiny", dtype="float32", width=16, heads=2, mlp_width=16, vision_width=16, vision_heads=2, vision_layers=1,
    image_size=8, text_layers=1, universal_layers=1, fusion_layers=1, decoder_layers=1, num_latents=2,
    vocab_size=VOCABULARY, max_positions=8, contrastive_width=8,
)  # fmt: skip
SETTINGS = TasksConfig(
    mlm=MlmConfig(mask_rate=0.5),
    vlm=VlmConfig(group_size=BATCH),
    search=SearchConfig(num_beams=2, min_length=1, max_length=4),
)
PROMPTS = Prompts(np.arange(4, 12, dtype=np.int32).reshape(2, 2, 2), num_classes=2, num_templates=2)
CONTEXT = TaskContext(config=SETTINGS, tokens=SpecialTokens(begin=1, end=2, mask=3), prompts=PROMPTS)
CLASSES = {"classify": 6, "mnli": 3, "stsb": len(SIMILARITY_LEVELS)}  # of other tasks: 2
HEADS = [name for name, task in TASKS.items() if "classifier" in task.parts]
WORDS = ["", "", "", "", *"abcdefghijkl"]


def decode(ids):
    return " ".join(WORDS[i] for i in ids if WORDS[i])


def make_batch(frames=1):
    """Return a batch with every key that tasks read."""
    rng = np.random.default_rng(0)
    ids = lambda: rng.integers(4, VOCABULARY, size=(BATCH, LENGTH)).astype(np.int32)  # noqa: E731
    mask = np.arange(LENGTH) < np.asarray([[5], [4], [5], [3]])
    batch = {
        "text": ids() * mask, "text_mask": mask, "instruction": ids() * mask, "instruction_mask": mask,
        "target": ids() * mask, "target_weights": mask.astype(np.float32),
        "example_id": np.arange(BATCH, dtype=np.int32), "label": np.asarray([0, 1, 1, 0], np.int32),
        "references": np.stack([ids() * mask, ids() * mask], axis=1),
        "box": np.asarray([[0, 0, 0.5, 0.5 + i / 8] for i in range(BATCH)], np.float32),
    }  # fmt: skip
    if frames:
        batch["frames"] = rng.integers(0, 256, size=(BATCH, frames, 8, 8, 3)).astype(np.uint8)
    return batch


def config_of(name):
    """Return the model config of a task."""
    return dataclasses.replace(CONFIG, num_classes=CLASSES.get(name, 2) if name in HEADS else 0)


def predict(task, model, batch):
    """Return the predictions of a batch, after the arrays that all batches share."""
    shared = task.precompute(model, CONTEXT) if task.precompute else {}
    return task.predict(model, batch | shared, CONTEXT)


def required_parts_of(name, frames=1):
    """Return the parts that a task requires, and whether its batches have frames."""
    has_frames = "frames" in TASKS[name].keys or bool(frames and TASKS[name].vision_parts and name not in GLUE)
    return required_parts([(TASKS[name], has_frames, frames > 1)]), has_frames


def examples_of(batch, name=""):
    """Return the examples of a batch."""
    if name == "stsb":
        rows = [{"label": np.asarray(value)} for value in batch["label"]]
        return [Example(row, f"key{i}", "", "a b", (f"{i}.3",)) for i, row in enumerate(rows)]
    rows = [{name: value[i] for name, value in batch.items()} for i in range(BATCH)]
    return [
        Example(
            row, f"key{i}", decode(row["text"]), decode(row["instruction"]), (decode(row["target"]), "b a", "b a", "c")
        )
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_listed_under_its_name_with_parts_that_exist(name):
    task = TASKS[name]
    assert task.name == name
    assert {*task.parts, *task.vision_parts, *task.text_parts} <= set(PARTS)
    assert (task.predict is None) == (task.score is None)
    spec = TASK_SPECS[name]
    assert {field.name: getattr(task, field.name) for field in dataclasses.fields(spec)} == vars(spec)
    assert (task.trainable, task.evaluable) == (task.loss is not None, task.predict is not None)
    assert (task.score_pairs is None) == (task.rerank is None)


@pytest.mark.parametrize("name", TASKS)
def test_batches_without_a_key_are_an_error_that_names_missing_and_available_keys(name):
    task = TASKS[name]
    task.check({*task.keys, "word_starts"}, "config.streams.x")
    for key in task.keys:
        available = {*task.keys, "word_starts"} - {key}
        with pytest.raises(UserError) as error:
            task.check(available, "config.streams.x")
        sentence = str(error.value)
        assert sentence.startswith(f"config.streams.x: task '{name}' reads {key}, ")
        assert f"its batches have {', '.join(sorted(available))}; set the missing ones" in sentence


def test_every_spec_is_of_a_task():
    assert list(TASK_SPECS) == list(TASKS)


USES = [*[(name, 1) for name in TASKS], ("ilm", 0), ("caption", 3), ("summarize", 0), ("classify", 3)]


@pytest.mark.parametrize(("name", "frames"), USES)
def test_parts_for_a_task_are_those_that_its_loss_reads_and_its_prediction_needs_no_others(name, frames):
    task = TASKS[name]
    parts, has_frames = required_parts_of(name, frames)
    read = {*task.keys, *(["frames"] if has_frames else [])}
    batch = {key: value for key, value in make_batch(frames).items() if key in read}
    model_def = define_model(config_of(name), parts)

    def used(params, batch):
        model = model_def.bind(params)
        if task.loss is None:
            return predict(task, model, batch)
        return task.loss(ForwardPass(model, batch, jax.random.key(0)), CONTEXT).loss

    traced = jax.make_jaxpr(used)(model_def.shapes, batch).jaxpr
    read = {id(variable) for eqn in traced.eqns for variable in eqn.invars}
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(model_def.shapes)]
    reached = {path[0].key for path, variable in zip(paths, traced.invars, strict=False) if id(variable) in read}
    assert reached == set(model_def.shapes)
    assert ("temporal" in parts) == (frames > 1)
    if task.predict:
        predict_batch = lambda params, batch: predict(task, model_def.bind(params), batch)  # noqa: E731
        predicted = jax.eval_shape(predict_batch, model_def.shapes, batch)
        assert all(value.shape[0] == BATCH for value in predicted.values())


def test_parts_for_several_uses_are_their_union_in_the_order_of_the_table():
    assert required_parts([]) == ()
    assert required_parts([(TASKS["mlm"], False, False)]) == ("text", "universal", "mlm")
    assert required_parts([(TASKS["mlm"], False, True)]) == ("text", "universal", "mlm")  # no vision, so no clips
    assert required_parts([(TASKS["ilm"], False, False)]) == ("text", "universal", "decoder")
    everything = [(TASKS["mlm"], False, False), (TASKS["vlm"], True, True), (TASKS["ilm"], True, False)]
    assert required_parts(everything) == tuple(part for part in PARTS if part != "classifier")
    assert required_parts(everything[::-1]) == required_parts(everything)


@pytest.fixture(scope="module")
def predictions():
    """Compute the predictions and losses of all tasks with an untrained model that has every part."""
    parts = tuple(part for part in PARTS if part not in ("classifier", "temporal"))
    model_def = define_model(CONFIG, parts)
    params = random_params(model_def)
    params["contrastive"]["temperature"] = jnp.asarray(0.07)
    generating = {name: task for name, task in TASKS.items() if name not in HEADS}

    def run(params, batch):
        model = model_def.bind(params)
        forward = ForwardPass(model, batch)
        predicted = {
            # The instruction-based task predicts as question answering does.
            name: predict(task, model, batch)
            for name, task in generating.items()
            if task.predict and (name == "answer" or task.predict is not answer.predict)
        }
        return predicted, {name: task.loss(forward, CONTEXT) for name, task in generating.items() if task.loss}

    predicted, losses = jax.device_get(jax.jit(run)(params, make_batch()))
    for name, task in generating.items():
        if task.predict is answer.predict:
            predicted[name] = predicted["answer"]
    for name in HEADS:
        task, (parts, has_frames) = TASKS[name], required_parts_of(name)
        model_def = define_model(config_of(name), parts)
        bound, batch = model_def.bind(random_params(model_def)), jax.device_put(make_batch(int(has_frames)))
        predicted[name] = jax.device_get(task.predict(bound, batch, CONTEXT))
        losses[name] = jax.device_get(task.loss(ForwardPass(bound, batch), CONTEXT))
    return predicted, losses


def random_params(model_def):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.3, jnp.float32), model_def.shapes)


@pytest.mark.parametrize("name", [name for name in TASKS if TASKS[name].loss])
def test_losses_are_finite_and_name_themselves_in_their_metrics(predictions, name):
    output = predictions[1][name]
    assert np.isfinite(output.loss)
    assert output.loss > 0 or name == "scst"  # its loss may be negative
    assert output.metrics["loss"] == output.loss
    assert all(np.isfinite(value) for value in output.metrics.values())


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.predict])
def test_predictions_are_scored_by_finite_metrics_with_baselines(predictions, name):
    examples = examples_of(make_batch(), name)
    predicted = predictions[0][name]
    if TASKS[name].rerank:
        predicted = TASKS[name].rerank(predicted, examples, CONTEXT, lambda pairs: np.float32(pairs[:, 0]))
    scored = TASKS[name].score(predicted, examples, decode)
    assert scored.metrics
    assert scored.metrics.keys() == scored.baselines.keys()
    assert all(len(metric) == BATCH for metric in scored.metrics.values())
    for metric, value in (*values_of(scored).items(), *scored.baselines.items()):
        assert np.isfinite(value)
        lowest = -1 if metric in ("matthews", "pearson", "spearman") else 0
        assert lowest <= value <= (1 if is_fraction(metric) else 1000)
    assert len(scored.predictions) == BATCH
    assert all(isinstance(text, str) for text in scored.predictions)
    assert scored.example_scores.shape == (BATCH,)
    assert np.isfinite(scored.example_scores).all()
    assert (scored.confusion is not None) == ((name in HEADS and name != "stsb") or name == "zero_shot")
    assert (scored.nearest is not None) == (name in ("vlc", "rerank"))


@pytest.mark.parametrize("name", ["answer", "caption"])
def test_generated_ids_begin_with_the_begin_token_and_end_in_padding(predictions, name):
    ids = predictions[0][name]["ids"]
    assert ids.shape == (BATCH, SETTINGS.search.max_length + 1)
    assert (ids[:, 0] == CONTEXT.tokens.begin).all()
    for row in ids.tolist():
        if CONTEXT.tokens.end in row:
            assert not any(row[row.index(CONTEXT.tokens.end) + 1 :])


def values_of(scored):
    return {name: metric.value for name, metric in scored.metrics.items()}


def sample(**fields):
    return Example(**{"arrays": {}, "key": "", **fields})


def test_an_answer_is_correct_if_it_equals_any_reference():
    examples = [sample(answers=("a", "b")), sample(answers=("a",)), sample(answers=("c",)), sample(answers=("a b",))]
    ids = np.asarray([[1, 5, 2, 0], [1, 4, 4, 2], [1, 6, 2, 0], [1, 5, 4, 2]])  # b, a a, c, b a
    scored = answer.score({"ids": ids}, examples, decode)
    assert scored.predictions == ["b", "a a", "c", "b a"]
    assert values_of(scored) == {"accuracy": 0.5}
    assert scored.baselines == {"accuracy": 0.5}  # of always "a"
    assert scored.example_scores.tolist() == [1, 0, 1, 0]


def test_masked_words_are_scored_where_they_were_masked():
    examples = [sample(arrays={"text": np.asarray(row)}) for row in ([1, 5, 5, 6, 2], [1, 5, 7, 2, 0])]
    ids = np.asarray([[9, 5, 9, 6, 2], [1, 5, 8, 9, 9]])
    masked = np.asarray([[0, 1, 1, 0, 0], [0, 1, 1, 0, 0]], bool)
    scored = mlm.score({"ids": ids, "masked": masked}, examples, decode)
    assert values_of(scored) == {"accuracy": 0.5}
    assert scored.baselines == {"accuracy": 0.75}  # of always 5
    assert scored.example_scores.tolist() == [0.5, 0.5]
    part = mlm.score({"ids": ids, "masked": masked & [[True], [False]]}, examples, decode)
    assert part.example_scores.tolist() == [0.5, 0.5]  # the second has no masked token, so it gets the overall fraction
    nothing = mlm.score({"ids": ids, "masked": masked & False}, examples, decode)
    assert values_of(nothing) == nothing.baselines == {"accuracy": 0.0}


def test_retrieval_is_scored_in_both_directions_and_predicts_the_nearest_text():
    examples = [
        sample(text=text, arrays={"example_id": np.asarray(i)}) for i, text in enumerate(("one", "two", "three"))
    ]
    visual = np.eye(3)
    text = np.asarray([[0.9, 0.1, 0], [0.8, 0.5, 0], [0, 0, 1.0]])  # the second text is nearer to the first visual
    scored = vlc.score({"visual": visual, "text": text}, examples, decode)
    assert scored.metrics["text_to_visual_r1"].value == pytest.approx(2 / 3)
    assert scored.metrics["visual_to_text_r1"].value == 1
    assert scored.metrics["text_to_visual_r5"].value == 1
    assert scored.baselines["text_to_visual_r1"] == pytest.approx(1 / 3)
    assert scored.baselines["visual_to_text_r10"] == 1
    assert scored.predictions == ["one", "two", "three"]
    assert scored.example_scores.tolist() == [-1, -1, -1]
    assert scored.nearest.texts.tolist() == [[0, 1, 2], [1, 0, 2], [2, 0, 1]]
    assert scored.nearest.visuals.tolist() == [[0, 1, 2], [0, 1, 2], [2, 0, 1]]
    assert scored.nearest.visual_of.tolist() == [0, 1, 2]


def test_all_texts_of_one_visual_are_correct():
    ids, texts = (7, 7, 3), ("one", "uno", "three")
    examples = [sample(text=t, arrays={"example_id": np.asarray(i)}) for i, t in zip(ids, texts, strict=True)]
    visual = np.asarray([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # the first two are the same visual
    text = np.asarray([[0.1, 0.2], [0.9, 0.0], [0.3, 0.8]])  # "one" is nearer to the other visual
    scored = vlc.score({"visual": visual, "text": text}, examples, decode)
    assert scored.metrics["visual_to_text_r1"].value == 1  # of two visuals
    assert scored.metrics["text_to_visual_r1"].value == pytest.approx(2 / 3)  # of three texts, and no copy competes
    assert scored.baselines["text_to_visual_r1"] == 1 / 2
    assert scored.baselines["visual_to_text_r1"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert scored.predictions == ["uno", "uno", "three"]
    assert scored.nearest.visuals.tolist() == [[2, 0], [0, 2], [2, 0]]  # a visual has the index of its first example
    assert scored.nearest.visual_of.tolist() == [0, 0, 2]


def test_a_prediction_scores_the_negated_rank_of_the_correct_text():
    examples = [sample(text=text, arrays={"example_id": np.asarray(i)}) for i, text in enumerate("abc")]
    text = np.asarray([[0.1, 0.9, 0], [0.9, 0.1, 0], [0.5, 0.2, 0.3]])
    scored = vlc.score({"visual": np.eye(3), "text": text}, examples, decode)
    assert scored.example_scores.tolist() == [-3, -3, -1]


def test_classes_score_the_probability_of_the_label_and_have_a_confusion_matrix():
    examples = [sample(answers=(name,), arrays={"label": np.asarray(i)}) for i, name in ((0, "cat"), (1, "dog"))]
    scored = classify.score({"probabilities": np.asarray([[0.2, 0.7, 0.1], [0.1, np.nan, 0]])}, examples, decode)
    assert scored.example_scores.tolist() == [0.2, 0]
    assert scored.confusion.to_dict() == {
        "classes": ["cat", "dog", "class 2"], "counts": [[0, 1, 0], [0, 1, 0], [0, 0, 0]]
    }  # fmt: skip


def test_a_number_scores_its_negated_error():
    examples = [sample(answers=(answer,)) for answer in ("1.0", "5.0", "3.0")]
    probabilities = np.zeros((3, len(SIMILARITY_LEVELS)))
    probabilities[[0, 1], [5, 0]] = 1
    probabilities[2] = np.nan
    scored = GLUE["stsb"].score({"probabilities": probabilities}, examples, decode)
    assert scored.example_scores.tolist() == [0, -5, -5]


def test_java_metrics_of_captions_are_present_or_absent(monkeypatch):
    """Every program starts once, for predictions and baselines together."""
    examples = [sample(answers=("a b", "a c")), sample(answers=("d e",))]
    output = EvalOutput({}, {}, ["a b", "f"], np.zeros(2))
    calls = []

    def spice(captions, references, timeout):
        calls.append((captions, references))
        return MeanMetric(np.asarray([100.0, 0.0, 10.0, 30.0]))

    monkeypatch.setattr(caption, "spice", spice)
    monkeypatch.setattr(caption, "meteor", lambda captions, references, timeout: None)
    result = caption.external_metrics(output, examples)
    assert calls == [(["a b", "f", "d e", "a b"], 2 * [["a b", "a c"], ["d e"]])]
    assert (result.metrics["spice"].value, result.baselines) == (50.0, {"spice": 20.0})
    assert (result.metrics.keys(), result.unavailable_metrics) == ({"spice"}, ("meteor",))
    assert result.predictions == output.predictions

    counts = np.arange(4 * 23, dtype=np.float64).reshape(4, 23)
    monkeypatch.setattr(caption, "meteor", lambda captions, references, timeout: Meteor(counts))
    monkeypatch.setattr(caption, "spice", lambda captions, references, timeout: None)
    result = caption.external_metrics(output, examples)
    assert (result.metrics["meteor"].value, result.unavailable_metrics) == (Meteor(counts[:2]).value, ("spice",))
    assert result.baselines == {"meteor": Meteor(counts[2:]).value}


def test_captions_are_compared_with_all_references_and_the_baseline_is_another_caption():
    texts = [("a b c d e", "a b c e d"), ("f g h i j",), ("k l a c e",)]
    ids = np.asarray([[1, *(WORDS.index(w) for w in t[0].split()), 2] for t in texts])
    scored = caption.score({"ids": ids}, [sample(answers=t) for t in texts], decode)
    assert scored.predictions == [t[0] for t in texts]
    assert scored.metrics["cider"].value > 100 > scored.baselines["cider"]
    assert scored.example_scores.mean() == pytest.approx(scored.metrics["cider"].value)


def test_settings_are_frozen_and_have_a_default_for_everything():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TasksConfig().mlm = MlmConfig(mask_rate=0.5)
