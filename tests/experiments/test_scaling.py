"""Scaling: the runs of the grid, power laws, losses that rise, and the plot."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mplug2_jax.experiments import scaling
from mplug2_jax.experiments.runs import METRICS
from mplug2_jax.experiments.scaling import (
    ScalingRun,
    find_loss_increases,
    fit_all,
    fit_power_law,
    grid_rows,
    plot,
    scale_run,
    train_grid,
)
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.durations import load_run_config


def test_width_and_budget_scale_the_run() -> None:
    demo = load_run_config("demo", [])
    assert scale_run(demo, 1.0, 1.0) == demo
    wide = scale_run(demo, 2.0, 0.5)
    assert (wide.steps, wide.schedule.warmup_steps) == (190, 12)
    assert (wide.model.width, wide.model.vision_width, wide.model.mlp_width) == (256, 256, 1024)
    assert (wide.model.heads, wide.model.vision_layers) == (demo.model.heads, demo.model.vision_layers)
    assert wide.model.init_std**2 * wide.model.width == pytest.approx(demo.model.init_std**2 * demo.model.width)
    assert demo.optimizer.learning_rate / wide.optimizer.learning_rate == pytest.approx(2**scaling.LR_EXPONENT)


def test_a_power_law_is_recovered_from_the_runs_that_no_cheaper_one_beats() -> None:
    flops = [1e12, 4e12, 16e12]
    fit = fit_power_law([*flops, 5e12], [3 * (flop / 1e12) ** -0.25 for flop in flops] + [2.9])
    assert (fit.scale, fit.exponent, fit.r2) == pytest.approx((3, 0.25, 1))
    flat = fit_power_law([1e12, 2e12], [3.0, 3.5])
    assert (flat.scale, flat.exponent) == (3, 0)
    assert np.isnan(flat.r2)


def test_losses_that_increase_with_more_steps_are_reported() -> None:
    runs = [
        ScalingRun(1.0, 20, 2e12, {"images/vlc": 2.0, "text/mlm": 3.5}, {}),
        ScalingRun(1.0, 10, 1e12, {"images/vlc": 3.0, "text/mlm": 3.0}, {}),
        ScalingRun(2.0, 10, 4e12, {"images/vlc": 4.0, "text/mlm": 9.0}, {}),  # of another width
    ]
    assert find_loss_increases(runs) == [
        "width x1: text/mlm rises from 3.0000 after 10 steps to 3.5000 after 20",
    ]


def test_the_grid_is_trained_read_and_plotted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def train_to_end(config: RunConfig, folder: Path, *, keep_checkpoints: bool) -> Mapping[str, Mapping[str, Any]]:
        folder.mkdir(parents=True)
        rate = 1e9 * (config.model.width / 128) ** 2
        lines = [
            {
                "step": step,
                "a/vlc/loss": 9 / step + 1,
                "b/mlm/loss": 2.0,
                "flops_per_second": rate,
                "seconds_per_step": 2,
            }
            for step in range(10, config.steps + 1, 10)
        ]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return {name: {"metrics": dict.fromkeys(METRICS[name], 0.5)} for name in config.evaluations}

    monkeypatch.setattr(scaling, "train_to_end", train_to_end)
    runs = train_grid(load_run_config("demo", ["--config.steps=100"]), tmp_path)
    assert len({(run.width, run.steps) for run in runs}) == 9
    assert [run.flops for run in runs] == sorted(run.flops for run in runs)
    middle = next(run for run in runs if (run.width, run.steps) == (1.0, 100))
    assert middle.flops == pytest.approx(100 * 2e9)
    assert middle.losses == pytest.approx({"a/vlc": 9 / 100 + 1, "b/mlm": 2.0})
    assert fit_all(runs)["a/vlc"].exponent > 0
    assert find_loss_increases(runs) == []
    rows = grid_rows(runs)
    assert rows[0][1] == "x0.5, 50"
    assert [row[0] for row in rows[1:4]] == ["TFLOP", "a/vlc", "b/mlm"]
    assert len({len(row) for row in rows}) == 1
    plot(runs, tmp_path / "new" / "scaling.png")
    pixels = np.asarray(Image.open(tmp_path / "new" / "scaling.png").convert("L"))
    assert 0.001 < (pixels < 128).mean() < 0.5
