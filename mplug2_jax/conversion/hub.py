"""A folder by Hugging Face's conventions: weights, settings, tokeniser, and a model card from what the run left."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from mplug2_jax.conversion.export_plan import ExportPlan
from mplug2_jax.conversion.layouts.official_config import settings_of
from mplug2_jax.training.workdir import special_tokens

WEIGHTS, SETTINGS = "model.safetensors", "config.json"


def write_companions(plan: ExportPlan, folder: Path) -> None:
    """Writes ``config.json``, the tokeniser's files and ``README.md`` beside the weights."""
    tokenizer = plan.tokenizer
    settings = settings_of(
        plan.identity.config, plan.fusion_start, task=plan.task, teacher=plan.teacher,
        tokens=special_tokens(tokenizer) if tokenizer else None,
    )  # fmt: skip
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    if tokenizer:
        for file in sorted(plan.workdir.tokenizer_folder.iterdir()):
            shutil.copyfile(file, folder / file.name)
    (folder / "README.md").write_text(model_card(plan, plan.workdir.path), encoding="utf-8")


def model_card(plan: ExportPlan, workdir: Path) -> str:
    """The card: recipe, data mixture, steps, and evaluation results as far as the work directory has them."""
    return _CARD.render(
        plan=plan, name=workdir.name, recipe=_json(workdir / "config.json"), results=_results(workdir, plan.step),
        config=plan.identity.config,
    )  # fmt: skip


def _results(workdir: Path, step: int) -> list[tuple[str, str, float, float, int]]:
    """(evaluation, figure, value, baseline, examples) of a step."""
    rows = []
    for path in sorted((workdir / "evaluations" / str(step)).glob("*.json")):
        found = _json(path) or {}
        for figure, value in found.get("figures", {}).items():
            baseline = found.get("baselines", {}).get(figure, float("nan"))
            rows.append((str(found.get("name")), str(figure), float(value), float(baseline), int(found["examples"])))
    return rows


def _json(path: Path) -> Mapping[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


_CARD = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
    (Path(__file__).parent / "model_card.md").read_text(encoding="utf-8")
)
