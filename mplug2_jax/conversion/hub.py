"""Write a folder by Hugging Face's conventions: weights, config, tokenizer, and a model card from the run's files."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

import mplug2_jax
from data_pipelines.tokenizers import WordPieceTokenizer
from mplug2_jax.conversion.export_plan import ExportPlan
from mplug2_jax.conversion.exported import CONFIG_NAME
from mplug2_jax.conversion.layouts.official_config import to_config_json
from mplug2_jax.conversion.runtime_files import AUTO_MAP, write_inference, write_processor, write_runtime
from mplug2_jax.errors import UserError
from mplug2_jax.evaluation.result_format import upgrade_result
from mplug2_jax.training.workdir import special_tokens

WEIGHTS = "model.safetensors"
_HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


def check_base_models(names: Sequence[str]) -> None:
    """Check that these are names of models on the hub, as "owner/name". Raises UserError."""
    for name in names:
        if not _HUB_NAME.fullmatch(name):
            raise UserError(
                f"--base-model {name!r} is no name on the hub, expected one as openai/clip-vit-large-patch14"
            )


def write_config_and_tokenizer(plan: ExportPlan, folder: Path, *, has_code: bool = False) -> None:
    """Write ``config.json``, with the classes of its code if there is one, and the tokenizer's files."""
    tokenizer = plan.tokenizer
    settings = to_config_json(
        plan.model.config, plan.fusion_start, task=plan.task, teacher=plan.teacher,
        tokens=special_tokens(tokenizer) if tokenizer else None,
    )  # fmt: skip
    if tokenizer:
        for file in sorted(plan.workdir.tokenizer_folder.iterdir()):
            (folder / file.name).write_bytes(file.read_bytes())
    if has_code:
        settings |= {"architectures": ["Mplug2Model"], "auto_map": AUTO_MAP}
    (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def write_companions(plan: ExportPlan, folder: Path, base_models: Sequence[str] = ()) -> None:
    """Write ``config.json``, the tokenizer's files, the program and ``README.md`` next to the weights."""
    tokenizer = plan.tokenizer
    config = plan.workdir.read_config() if tokenizer and plan.workdir.exists() else None
    write_config_and_tokenizer(plan, folder, has_code=config is not None)
    if tokenizer and config:
        write_inference(config, folder)
        write_processor(tokenizer, plan.model.config, folder)
    # The model card: recipe, data mixture, steps, and evaluation results if the work directory has them.
    workdir = plan.workdir.path
    results = _results(workdir, plan.step)
    card = _CARD.render(
        metadata=_card_metadata(plan, results, base_models, has_code=config is not None),
        plan=plan, name=workdir.name, recipe=_read_json(workdir / "config.json"), results=results,
        config=plan.model.config, code=write_runtime(folder) if config else (), version=mplug2_jax.__version__,
        is_wordpiece=isinstance(tokenizer, WordPieceTokenizer), is_sampled=bool(config and config.tasks.search.top_p),
    )  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")


def _card_metadata(
    plan: ExportPlan, results: Sequence[tuple[str, str, float, float, int]], base_models: Sequence[str], *,
    has_code: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return the card's metadata by the hub's conventions, with the results as its ``model-index``."""
    task = "visual-question-answering" if plan.task == "videoqa" else "image-to-text"
    metadata: dict[str, Any] = {"pipeline_tag": task, "tags": ["mplug2", "video", "image", "text"]}
    if has_code:
        metadata["library_name"] = "transformers"
    if base_models:
        metadata["base_model"] = list(base_models)
    entries = [
        {
            "task": {"type": task}, "dataset": {"name": evaluation, "type": evaluation},
            "metrics": [{"type": metric, "value": value}],
        }
        for evaluation, metric, value, _, _ in results if math.isfinite(value)
    ]  # fmt: skip
    if entries:
        metadata["model-index"] = [{"name": plan.workdir.path.name, "results": entries}]
    return metadata


def _results(workdir: Path, step: int) -> list[tuple[str, str, float, float, int]]:
    """Return (evaluation, metric, value, baseline, examples) of a step."""
    rows = []
    for path in sorted((workdir / "evaluations" / str(step)).glob("*.json")):
        result = upgrade_result(_read_json(path) or {})
        examples = int(result.get("num_examples", 0))
        for metric, value in result.get("metrics", {}).items():
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
