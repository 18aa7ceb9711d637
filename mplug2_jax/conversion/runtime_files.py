"""Write the program that an exported folder carries, as copies of the project's own files, and its settings."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.tokenizers import SPECIAL_TOKENS, Tokenizer, WordPieceTokenizer
from mplug2_jax.conversion.exported import INFERENCE
from mplug2_jax.inference.media import instruction_config, visual_config
from mplug2_jax.model.config import ModelConfig
from mplug2_jax.model.vision import PIXEL_MEAN, PIXEL_STD
from mplug2_jax.training.config import RunConfig

# Patterns of the files to copy. With its own name, the first folder would hide an installed mplug2_jax.
_PACKAGES = (
    ("mplug2_jax", "mplug2_torch", (
        "__init__.py", "errors.py", "conversion/__init__.py", "conversion/torch_runtime/*.py",
        "conversion/exported/__init__.py", "conversion/exported/command.py", "conversion/exported/model.py",
        "conversion/exported/preprocessing.py",
    )),
    ("data_pipelines", "data_pipelines", (
        "__init__.py", "arrays.py", "augment.py", "config.py", "errors.py", "examples.py", "frames.py", "image.py",
        "media.py", "record.py", "text.py", "tokenizers.py", "transforms.py", "video.py", "visual.py",
        "storage/__init__.py", "storage/file_system.py", "storage/retry.py",
    )),
)  # fmt: skip
_ROOT_FILES = (
    "run.py", "requirements.txt", "mplug2_runtime.py", "configuration_mplug2.py", "modeling_mplug2.py",
    "processing_mplug2.py",
)  # fmt: skip
_PROGRAM, _PROJECT = Path(__file__).parent / "exported", Path(__file__).parents[2]
AUTO_MAP = {
    "AutoConfig": "configuration_mplug2.Mplug2Config",
    "AutoModel": "modeling_mplug2.Mplug2Model",
    "AutoProcessor": "processing_mplug2.Mplug2Processor",
}
"""The classes that transformers loads with trust_remote_code."""


def write_runtime(folder: Path) -> list[tuple[str, str]]:
    """Copy the program into a folder; return the path of each of its files, from there, and its SHA-256."""
    sources = {name: _PROGRAM / name for name in _ROOT_FILES}
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
    _write_json(folder / INFERENCE, inference_settings(config))


def write_processor(tokenizer: Tokenizer, config: ModelConfig, folder: Path) -> None:
    """Write what transformers' ``AutoProcessor`` and ``AutoTokenizer`` read; the latter has no SentencePiece."""
    processor = {
        "processor_class": "Mplug2Processor", "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]},
        "size": {"height": config.image_size, "width": config.image_size},
        "image_mean": PIXEL_MEAN, "image_std": PIXEL_STD,
    }  # fmt: skip
    _write_json(folder / "preprocessor_config.json", processor)
    if isinstance(tokenizer, WordPieceTokenizer):
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_positions,
            "clean_up_tokenization_spaces": True, **dict(zip(names, SPECIAL_TOKENS, strict=True)),
        }  # fmt: skip
        _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
