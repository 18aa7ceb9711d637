"""Write the program that an exported folder carries, as copies of the project's own files, and its settings."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from mplug2_jax.conversion.exported import INFERENCE
from mplug2_jax.inference.media import instruction_config, visual_config
from mplug2_jax.training.config import RunConfig

# Patterns of the files to copy. With its own name, the first folder would hide an installed mplug2_jax.
_PACKAGES = (
    ("mplug2_jax", "mplug2_torch", (
        "__init__.py", "errors.py", "conversion/__init__.py", "conversion/torch_runtime/*.py",
        "conversion/exported/__init__.py", "conversion/exported/command.py", "conversion/exported/model.py",
    )),
    ("data_pipelines", "data_pipelines", (
        "__init__.py", "arrays.py", "augment.py", "config.py", "errors.py", "examples.py", "frames.py", "image.py",
        "media.py", "record.py", "text.py", "tokenizers.py", "transforms.py", "video.py", "visual.py",
        "storage/__init__.py", "storage/file_system.py", "storage/retry.py",
    )),
)  # fmt: skip
_PROGRAM, _PROJECT = Path(__file__).parent / "exported", Path(__file__).parents[2]


def write_runtime(folder: Path) -> list[tuple[str, str]]:
    """Copy the program into a folder; return the path of each of its files, from there, and its SHA-256."""
    sources = {name: _PROGRAM / name for name in ("run.py", "requirements.txt")}
    for package, name, patterns in _PACKAGES:
        root = _PROJECT / package
        files = (file for pattern in patterns for file in sorted(root.glob(pattern)))
        sources |= {f"{name}/{file.relative_to(root).as_posix()}": file for file in files}
    rows = []
    for path, source in sources.items():
        content = source.read_bytes()
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
        rows.append((path, hashlib.sha256(content).hexdigest()))
    return rows


def inference_settings(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return how ``mplug2 generate`` reads files and instructions with a run, and how it searches."""
    examples, search = instruction_config(config), config.tasks.search
    return {
        "visual": dataclasses.asdict(visual_config(config)),
        "examples": {name: getattr(examples, name) for name in ("tokenization", "prompt", "max_question_words")},
        "search": {
            "num_beams": search.num_beams, "min_length": search.min_length,
            "max_length": min(search.max_length, config.model.max_positions),
            "extend_finished": search.extend_finished,
        },
    }  # fmt: skip


def write_inference(config: RunConfig, folder: Path) -> None:
    """Write :func:`inference_settings` to a folder."""
    (folder / INFERENCE).write_text(json.dumps(inference_settings(config), indent=1), encoding="utf-8")
