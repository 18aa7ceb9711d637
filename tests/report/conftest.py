"""A work directory made by hand: config, metrics and evaluations with pictures, and nothing that trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CONFIG: dict[str, Any] = {
    "name": "synthetic",
    "steps": 100,
    "model": {"vision_layers": 4, "vision_width": 128, "image_size": 32, "patch_size": 8, "text_layers": 1, "width": 9},
    "streams": {
        "image_text": {
            "data": {"sources": {"digits": {"format": "digitworld", "kind": "image"}}, "batch_size": 64},
            "objectives": {"vlc": 1.0, "ilm": 0.5},
        }
    },
    "evaluations": {"image_question": {}, "image_caption": {}},
}


class Run:
    """Writes what a run writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config(CONFIG)

    def config(self, values: Any) -> None:
        (self.path / "config.json").write_text(json.dumps(values), encoding="utf-8")

    def metrics(self, *lines: Any) -> None:
        """Appends lines: bytes as they are, anything else as JSON."""
        with (self.path / "metrics.jsonl").open("ab") as file:
            for line in lines:
                file.write(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")

    def evaluation(self, name: str, step: int = 100, *, samples: Any = (), **fields: Any) -> Path:
        """Writes ``evaluations/STEP/NAME.json``; a field given as None is left out."""
        return results(self.path / "evaluations" / str(step), name, step, samples=samples, **fields)

    def picture(self, name: str, step: int = 100, frames: int = 3) -> Path:
        """Writes a strip of frames beside the evaluations of a step."""
        path = self.path / "evaluations" / str(step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8 * frames, 3), np.uint8)
        Image.fromarray(pixels).save(path, "PNG")
        return path


def results(folder: Path, name: str, step: int = 100, *, samples: Any = (), said: Any = (), **fields: Any) -> Path:
    """Writes ``NAME.json`` into a folder, and ``NAME.jsonl`` if anything is ``said``; a None field is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "task": "answer", "step": step, "examples": 8, "figures": {"accuracy": 0.5}, "baselines": {"accuracy": 0.25},
        "samples": list(samples),
    } | fields  # fmt: skip
    if said:
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in said))
    path = folder / f"{name}.json"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    path = tmp_path / "run"
    path.mkdir()
    return Run(path)


def sample(**fields: Any) -> dict[str, Any]:
    """One sample of an evaluation."""
    return {"key": "k", "instruction": "what is it?", "text": "", "said": "a four", "true": ["a five"]} | fields
