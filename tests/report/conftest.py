"""A work directory that no run wrote: config, metrics and evaluations with images."""

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
            "data": {
                "sources": {"digits": {"format": "digitworld", "kind": "image"}}, "batch_size": 64,
                "batch_ramp": [{"last_step": 9, "batch_size": 32}],
            },
            "objectives": {"vlc": 1.0, "ilm": 0.5},
        }
    },
    "evaluations": {"image_question": {}, "image_caption": {}},
}  # fmt: skip


class Run:
    """Writes the files of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config(CONFIG)

    def config(self, values: Any) -> None:
        (self.path / "config.json").write_text(json.dumps(values), encoding="utf-8")

    def metrics(self, *lines: Any) -> None:
        """Append lines: bytes as they are, anything else as JSON."""
        with (self.path / "metrics.jsonl").open("ab") as file:
            for line in lines:
                file.write(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")

    def evaluation(self, name: str, step: int = 100, *, samples: Any = (), **fields: Any) -> Path:
        """Write ``evaluations/STEP/NAME.json``; fields that are None are omitted."""
        return write_results(self.path / "evaluations" / str(step), name, step, samples=samples, **fields)

    def frames(self, name: str, step: int = 100, num_frames: int = 3) -> Path:
        """Write a strip of frames next to the evaluations of a step."""
        path = self.path / "evaluations" / str(step) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8 * num_frames, 3), np.uint8)
        Image.fromarray(pixels).save(path, "PNG")
        return path


def write_results(
    folder: Path, name: str, step: int = 100, *, samples: Any = (), predictions: Any = (), **fields: Any
) -> Path:
    """Write ``NAME.json`` into a folder, and ``NAME.jsonl`` if there are predictions; None fields are omitted."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "format_version": 2, "task": "answer", "step": step, "num_examples": 8, "metrics": {"accuracy": 0.5},
        "baselines": {"accuracy": 0.25}, "samples": list(samples),
    } | fields  # fmt: skip
    if predictions:
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in predictions))
    path = folder / f"{name}.json"
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    path = tmp_path / "run"
    path.mkdir()
    return Run(path)


def sample(**fields: Any) -> dict[str, Any]:
    """Return a sample of an evaluation."""
    prediction = {"prediction": "a four", "references": ["a five"]}
    return {"key": "k", "instruction": "what is it?", "text": "", **prediction} | fields
