"""Result files of format 1 and config fields by their old names are still read."""

import pytest

from data_pipelines.config import DataConfig, ExampleConfig, SourceConfig
from mplug2_jax.config import as_recipe, build, override
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.evaluation.result_format import upgrade_prediction, upgrade_result
from mplug2_jax.training.config import RunConfig
from tests.runs import small_run


def test_a_result_of_format_1_has_the_current_keys() -> None:
    old = {
        "name": "test", "task": "summarise", "examples": 2, "figures": {"rouge_1": 50.0}, "intervals": {},
        "samples": [
            {"said": "a", "true": ["b"], "goodness": 0.5, "why": "first",
             "nearest_texts": [{"text": "c", "right": True}],
             "nearest_pictures": {"frames": "test-0-nearest.png", "right": [False]}},
            {"said": "a", "true": ["a"]},
        ],
    }  # fmt: skip
    new = {
        "name": "test", "task": "summarize", "num_examples": 2, "metrics": {"rouge_1": 50.0},
        "confidence_intervals": {},
        "samples": [
            {"prediction": "a", "references": ["b"], "score": 0.5, "category": "first",
             "nearest_texts": [{"text": "c", "correct": True}],
             "nearest_images": {"frames": "test-0-nearest.png", "correct": [False]}},
            {"prediction": "a", "references": ["a"]},
        ],
    }  # fmt: skip
    assert upgrade_result(old) == new
    assert upgrade_result(new) == new


def test_a_prediction_of_format_1_has_the_current_keys() -> None:
    new = {"key": "k", "prediction": "a", "reference": "b", "score": 1.0}
    assert upgrade_prediction({"key": "k", "said": "a", "true": "b", "goodness": 1.0}) == new
    assert upgrade_prediction(new) == new


@pytest.mark.parametrize(
    ("word", "field", "value"),
    [
        ("ranked=2", "num_ranked", 2), ("answers=a.json", "answers_file", "a.json"),
        ("java=true", "java_metrics", True),
        ("device_rows=4", "per_device_batch_size", 4), ("samples=1", "num_samples", 1),
        ("task=summarise", "task", "summarize"),
    ],
)  # fmt: skip
def test_a_config_takes_old_names(word: str, field: str, value: object) -> None:
    data = DataConfig(
        sources={"digits": SourceConfig(kind="text")}, examples=ExampleConfig(text="sentence"), batch_size=8
    )
    recipe = as_recipe(small_run(evaluations={"words": EvaluationConfig(task="mlm", data=data)}))
    config = build(RunConfig, override(recipe, [f"--config.evaluations.words.{word}"]))
    assert getattr(config.evaluations["words"], field) == value
