"""Zero-shot classification: class features from prompts, predictions, and errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.config import DataConfig, ExampleConfig, InstructionConfig, SourceConfig
from mplug2_jax.config import build, load_recipe
from mplug2_jax.errors import UserError
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.evaluation.loop import Evaluation
from mplug2_jax.evaluation.prompts import encode_prompts
from mplug2_jax.model.mplug2 import define_model
from mplug2_jax.objectives.forward import ForwardPass
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.tasks import zero_shot
from mplug2_jax.tasks.base import TaskContext
from mplug2_jax.tasks.config import TasksConfig
from mplug2_jax.training.config import RunConfig, TokenizerConfig
from mplug2_jax.training.workdir import load_or_train_tokenizer, special_tokens
from tests.close import assert_close
from tests.runs import SMALL, small_model

PARTS = ("vision", "text", "universal", "contrastive")
NAMES = ("zero", "one", "two", "seven", "nine")
TEMPLATES = ("a large {label}", "we see a {label} at the top left")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def tokenizer():
    return load_or_train_tokenizer(TokenizerConfig(vocab_size=200))


@pytest.fixture(scope="module")
def model_def():
    return define_model(small_model(), PARTS)


@pytest.fixture(scope="module")
def params(model_def):
    """Return initial parameters with a vision tower three times as large, or all images would have one class."""
    params = model_def.init(jax.random.key(0))
    return params | {"vision": jax.tree.map(lambda x: 3 * x, params["vision"])}


def evaluation(model_def, tokenizer, *, batch_size=8, mesh=None, names=(), prompts=TEMPLATES, task="zero_shot"):
    data = DataConfig(
        sources={"digits": SourceConfig(kind="image", split="heldout", max_records=20)}, visual=SMALL,
        batch_size=batch_size,
        examples=ExampleConfig(instructions={"label": InstructionConfig(templates=("",))}, classes=DIGITS),
    )  # fmt: skip
    config = EvaluationConfig(task=task, data=data, prompts=prompts, class_names=names)
    context = TaskContext(config=TasksConfig(), tokens=special_tokens(tokenizer))
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    return Evaluation("digits", config, model_def, context, tokenizer, mesh or one, seed=0)


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_a_class_is_the_mean_direction_of_its_prompts(model_def, params, tokenizer, rows):
    prompts = encode_prompts("here", TEMPLATES, NAMES, tokenizer, 12, rows)
    assert prompts.ids.shape[1] == rows
    context = TaskContext(config=TasksConfig(), tokens=special_tokens(tokenizer), prompts=prompts)
    unpooled = dataclasses.replace(context, prompts=prompts._replace(pooling="probabilities"))

    @jax.jit
    def precompute(params):
        return [zero_shot.precompute(model_def.bind(params), each) for each in (context, unpooled)]

    @jax.jit
    def text_features(params, ids):
        model = model_def.bind(params)
        return model.contrastive.text_features(model.encode_text(ids, jnp.ones(ids.shape, bool)))

    output, each = (classes["class_features"] for classes in precompute(params))
    assert output.shape == (len(NAMES), 1, 16)
    for i, (name, [features]) in enumerate(zip(NAMES, output, strict=True)):
        vectors = []
        for template in TEMPLATES:
            ids = jnp.asarray([tokenizer.encode(template.format(label=name), max_length=12)])
            vectors.append(text_features(params, ids)[0])
        mean = sum(vectors) / len(vectors)
        assert_close(features, mean / jnp.linalg.norm(mean))
        assert_close(each[i], jnp.stack(vectors))


def test_class_probability_is_the_sum_over_its_prompts(model_def, params):
    frames = np.random.default_rng(1).integers(0, 256, (3, 1, 16, 16, 3)).astype(np.uint8)
    batch = {"frames": jnp.asarray(frames), "class_features": jnp.eye(6, 16).reshape(3, 2, 16)}
    model = model_def.bind(params)
    visual = model.contrastive.visual_features(ForwardPass(model, batch).visual)
    context = TaskContext(config=TasksConfig(), tokens=special_tokens(load_or_train_tokenizer(TokenizerConfig())))
    output = zero_shot.predict(model, batch, context)["probabilities"]
    assert_close(output, jax.nn.softmax(visual[:, :6] / 0.07).reshape(3, 3, 2).sum(-1))


def test_neither_the_batch_size_nor_the_mesh_changes_the_classes(model_def, params, tokenizer):
    whole = evaluation(model_def, tokenizer).run(params, 1)
    split = evaluation(model_def, tokenizer, batch_size=16, mesh=make_mesh(MeshConfig(data=2, fsdp=4))).run(params, 1)
    for ours, theirs in zip(split.predictions, whole.predictions, strict=True):
        assert ours | {"score": 0} == theirs | {"score": 0}
        assert_close(ours["score"], theirs["score"], 1.5e-4, scale=1)  # rounded to four digits
    assert whole.metrics == split.metrics
    assert {"top_1", "top_5"} == set(whole.metrics)
    assert len({row["prediction"] for row in whole.predictions}) > 1  # not one class for all


def test_class_names_replace_labels(model_def, params, tokenizer):
    """Metrics count labels; with reversed names, predictions are reversed too."""
    straight = evaluation(model_def, tokenizer).run(params, 1)
    reversed_names = evaluation(model_def, tokenizer, names=DIGITS[::-1]).run(params, 1)
    opposite = {str(a): b for a, b in zip(DIGITS, DIGITS[::-1], strict=True)}
    for a, b in zip(straight.predictions, reversed_names.predictions, strict=True):
        if "class" not in a["prediction"] + b["prediction"]:  # a class without examples has only a number
            assert opposite[a["prediction"]] == b["prediction"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": ()}, "prompts is empty"),
        ({"prompts": ("a digit",)}, "is the same for every class"),
        ({"prompts": ("a {label} {x}",)}, "the only field is {label}"),
        ({"names": ("one", "two")}, "class_names has 2 names, expected one for each of 10 classes"),
        ({"task": "classify"}, "are for the task 'zero_shot', not for 'classify'"),
    ],
)
def test_invalid_prompts_are_an_error(tokenizer, fields, message):
    both = define_model(dataclasses.replace(small_model(), num_classes=10), (*PARTS, "classifier"))
    with pytest.raises(UserError, match=message):
        evaluation(both, tokenizer, **fields)


def test_a_task_without_a_loss_is_no_objective():
    recipe = load_recipe("digitworld:digit")
    recipe.streams.digits.objectives = {"zero_shot": 1.0}
    with pytest.raises(UserError, match=r"objectives.zero_shot is unknown"):
        build(RunConfig, recipe)
