"""Write a folder by Hugging Face's conventions: weights, config, tokenizer, and a model card from the run's files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

import mplug2_jax
from mplug2_jax.conversion.export_plan import ExportPlan
from mplug2_jax.conversion.exported import SETTINGS
from mplug2_jax.conversion.layouts.official_config import to_config_json
from mplug2_jax.conversion.runtime_files import write_inference, write_runtime
from mplug2_jax.training.workdir import special_tokens

WEIGHTS = "model.safetensors"


def write_settings(plan: ExportPlan, folder: Path) -> None:
    """Write ``config.json`` and the tokenizer's files."""
    tokenizer = plan.tokenizer
    settings = to_config_json(
        plan.model.config, plan.fusion_start, task=plan.task, teacher=plan.teacher,
        tokens=special_tokens(tokenizer) if tokenizer else None,
    )  # fmt: skip
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    if tokenizer:
        for file in sorted(plan.workdir.tokenizer_folder.iterdir()):
            (folder / file.name).write_bytes(file.read_bytes())


def write_companions(plan: ExportPlan, folder: Path) -> None:
    """Write ``config.json``, the tokenizer's files, the program and ``README.md`` next to the weights."""
    write_settings(plan, folder)
    config = plan.workdir.read_config() if plan.tokenizer and plan.workdir.exists() else None
    if config:
        write_inference(config, folder)
    # The model card: recipe, data mixture, steps, and evaluation results if the work directory has them.
    workdir = plan.workdir.path
    card = _CARD.render(
        plan=plan, name=workdir.name, recipe=_read_json(workdir / "config.json"), results=_results(workdir, plan.step),
        config=plan.model.config, code=write_runtime(folder) if config else (), version=mplug2_jax.__version__,
        is_sampled=bool(config and config.tasks.search.top_p),
    )  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")


def _results(workdir: Path, step: int) -> list[tuple[str, str, float, float, int]]:
    """Return (evaluation, metric, value, baseline, examples) of a step (old result files say ``figures``)."""
    rows = []
    for path in sorted((workdir / "evaluations" / str(step)).glob("*.json")):
        result = _read_json(path) or {}
        examples = int(result.get("num_examples", result.get("examples", 0)))
        for metric, value in (result.get("metrics") or result.get("figures") or {}).items():
            baseline = result.get("baselines", {}).get(metric, float("nan"))
            rows.append((str(result.get("name")), str(metric), float(value), float(baseline), examples))
    return rows


def _read_json(path: Path) -> Mapping[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


_CARD = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
    (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
)
