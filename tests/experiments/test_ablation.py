"""Ablation: the variants' runs, differences of paired seeds, and the plot."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mplug2_jax.experiments.ablation import FULL, VARIANTS, Effect, ablate, effects, plot, run_variants
from mplug2_jax.recipes.digitworld import zero_shot_evaluations
from mplug2_jax.training.config import CheckpointConfig, RunConfig
from mplug2_jax.training.durations import load_run_config
from tests.runs import ONE_LAYER


def demo(*overrides: str) -> RunConfig:
    config = load_run_config("demo", overrides)
    return dataclasses.replace(config, evaluations={**config.evaluations, **zero_shot_evaluations()})


def test_variants_drop_parts_or_streams_and_the_evaluations_that_need_them() -> None:
    config = demo()
    runs = {name: ablate(config, variant) for name, variant in VARIANTS.items()}
    assert runs[FULL] == config
    assert set(runs[FULL].parts()) - set(runs["no universal layers"].parts()) == {"universal"}
    assert runs["no universal layers"].evaluations == config.evaluations
    assert runs["two universal layers"] == demo("--config.model.universal_layers=2")
    assert runs["no temporal units"].parts() == config.parts()
    assert runs["no temporal units"].freeze == ("temporal",)
    for name, stream, kind in (("no text stream", "text", "text"), ("no image stream", "image_text", "image")):
        assert set(config.streams) - set(runs[name].streams) == {stream}
        lost = set(config.evaluations) - set(runs[name].evaluations)
        assert lost == {each for each in config.evaluations if config.evaluations[each].data.kind == kind}
    assert "temporal" not in runs["no video stream"].parts()


def test_effects_are_paired_by_seed_and_only_of_metrics_that_both_have() -> None:
    metrics = {
        FULL: [
            {"action/top_1": 0.5, "masked_words/accuracy": 0.25},
            {"action/top_1": 0.25, "masked_words/accuracy": 0},
        ],
        "no text stream": [{"action/top_1": 0.25}, {"action/top_1": 0.125}],
    }
    [row] = effects(metrics)
    assert row.differences == [0.25, 0.125]
    assert row.cells()[:5] == ("no text stream", "action/top_1", "37.5%", "18.8%", "18.8%")


def test_effects_are_plotted_also_of_one_seed_and_of_a_full_model_at_zero(tmp_path: Path) -> None:
    rows = [
        Effect("no text stream", "action/top_1", [0.1, 0.2], [0.4, 0.3]),
        Effect("no text stream", "digit/top_1", [0.1, 0.2], [0.0, 0.0]),
        Effect("no video stream", "video_retrieval/text_to_visual_r1", [0.1], [0.2]),
    ]
    plot(rows, tmp_path / "new" / "ablation.png")
    pixels = np.asarray(Image.open(tmp_path / "new" / "ablation.png").convert("L"))
    assert 0.001 < (pixels < 160).mean() < 0.5


@pytest.mark.slow
def test_variants_are_trained_evaluated_and_read_again(tmp_path: Path) -> None:
    pretraining = demo("--config.steps=1", *ONE_LAYER)
    pretraining = dataclasses.replace(
        pretraining,
        streams={"video_text": dataclasses.replace(pretraining.streams["video_text"], objectives={"vlc": 1.0})},
        evaluations={name: pretraining.evaluations[name] for name in ("video_retrieval", "image_retrieval")},
        checkpoint=CheckpointConfig(),
    )
    finetuning = load_run_config("digitworld:action", ["--config.steps=1", *ONE_LAYER])
    names = (FULL, "no temporal units")

    def run() -> list[object]:
        return list(run_variants(pretraining, finetuning, tmp_path, names, seeds=1))

    trained = run()
    assert [(name, seed) for name, seed, _ in trained] == [(name, 0) for name in names]
    expected = {"video_retrieval/text_to_visual_r1", "video_retrieval/visual_to_text_r1", "action/top_1"}
    assert all(set(metrics) == expected for *_, metrics in trained)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json*")}
    assert run() == trained
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json*")} == times
