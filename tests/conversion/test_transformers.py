"""An exported folder works with transformers' auto classes, from a folder and from the hub's cache, without JAX."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.media import write_video
from data_pipelines.tokenizers import load_tokenizer
from mplug2_jax.conversion.export_weights import export
from mplug2_jax.conversion.exported.mplug2_runtime import find_old
from tests.close import assert_close

pytest.importorskip("transformers", reason="transformers is not installed here")

REPOSITORY, COMMIT = "someone/mplug2-test", "0123456789" * 4
QUESTIONS = ("which digit moves?", "what is this")
PROGRAM = """
import json, sys

import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

given = json.loads(sys.argv[1])
hub, clips, picture, questions = given["hub"], given["clips"], given["picture"], given["questions"]


def load(name):
    trust = {"trust_remote_code": True}
    return AutoModel.from_pretrained(name, **trust).eval(), AutoProcessor.from_pretrained(name, **trust)


def ask(name):
    model, processor = load(name)
    ids = model.generate(**processor(videos=clips, text=questions))
    return ids.tolist(), processor.batch_decode(ids)


def error_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


model, processor = load(hub)
frames = processor(images=[picture, Image.open(picture)])
labels = torch.tensor(given["labels"])
with torch.no_grad():
    output = model(**processor(videos=clips, text=questions), labels=labels)
result = {
    "asked": ask(hub),
    "pictures": model.generate(**frames, num_beams=2).tolist(),
    "loss": output.loss.item(),
    "logits": output.logits.tolist(),
    "tokens": AutoTokenizer.from_pretrained(hub, trust_remote_code=True)(given["text"]).input_ids,
    "layers": AutoConfig.from_pretrained(hub, trust_remote_code=True).num_hidden_layers,
    "errors": [
        error_of(processor), error_of(processor, images=picture, text=questions),
        error_of(model.generate, frames["pixel_values"]), error_of(model.generate, **frames, beams=3),
        error_of(processor, videos=given["sound"]), error_of(processor, videos=torch.zeros(3, 4, 4, 3)),
    ],
}
model.save_pretrained(given["saved"])
result["saved"] = ask(given["saved"])
result["downloaded"], result["sharded"] = ask(given["repository"]), ask(given["sharded"])
half = AutoModel.from_pretrained(hub, trust_remote_code=True, dtype=torch.bfloat16)
result["dtype"] = str({tensor.dtype for tensor in half.parameters()})
for broken in given["broken"]:
    result["errors"].append(error_of(load, broken))
result["imported"] = sorted({"absl", "flax", "grain", "jax", "mplug2_jax", "optax", "orbax"} & set(sys.modules))
print(json.dumps(result))
"""


def broken(folder: Path, name: str, file: str, changes: dict[str, Any] | None) -> str:
    copy = shutil.copytree(folder / "hub", folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    if changes is None:
        (copy / file).unlink()
    else:
        (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | changes))
    return str(copy)


def test_auto_classes_compute_what_the_project_computes(exported: Path, tmp_path: Path) -> None:
    import torch

    from mplug2_jax.conversion.exported.model import ExportedModel

    hub, clip = exported / "hub", tmp_path / "long.mp4"
    write_video(clip, np.random.default_rng(1).integers(0, 256, (9, 48, 32, 3), np.uint8))
    cache = tmp_path / "cache" / f"models--{REPOSITORY.replace('/', '--')}"
    shutil.copytree(hub, cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    export(exported / "run", tmp_path / "sharded", shard_bytes=200_000)
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    labels = [[2, 7, 8, 9, 3], [2, 9, 3, 0, 0]]
    given = {
        "hub": str(hub), "clips": [str(exported / "a.mp4"), str(clip)], "picture": str(exported / "a.png"),
        "questions": QUESTIONS, "text": "a Digit moves, right?", "saved": str(tmp_path / "saved"), "labels": labels,
        "repository": REPOSITORY, "sharded": str(tmp_path / "sharded"), "sound": str(exported / "sound.wav"),
        "broken": [
            broken(exported, "of_other_weights", "config.json", {"decoder_layers": 2}),
            broken(exported, "without_inference", "inference.json", None),
            broken(exported, "without_a_module", "mplug2_torch/__init__.py", None),
        ],
    }  # fmt: skip
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-I", "-c", PROGRAM, json.dumps(given)], capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert not result["imported"]

    ours = ExportedModel(hub)
    predictions = [
        ours.generate(Path(path), question) for path, question in zip(given["clips"], QUESTIONS, strict=True)
    ]
    length = max(len(prediction.ids) for prediction in predictions)
    asked = [prediction.ids + [0] * (length - len(prediction.ids)) for prediction in predictions]
    assert result["asked"] == [asked, [prediction.text for prediction in predictions]]
    assert result["saved"] == result["downloaded"] == result["sharded"] == result["asked"]
    assert result["pictures"][0] == result["pictures"][1] != asked[0]
    assert result["tokens"] == load_tokenizer(hub).encode(given["text"])
    assert result["layers"] == ours.model.config.decoder_layers
    assert result["dtype"] == "{torch.bfloat16}"
    weights = torch.tensor(labels)[:, 1:] > 0
    losses = (
        -torch.tensor(result["logits"]).log_softmax(-1)[:, :-1].gather(2, torch.tensor(labels)[:, 1:, None])[..., 0]
    )
    assert_close(np.asarray(result["loss"]), ((losses * weights).sum() / weights.sum()).numpy())
    for error, message in zip(result["errors"], [
        "ValueError: expected either images or videos", "ValueError: 2 texts for 1 images or clips",
        "ValueError: input_ids are missing, expected the ids of a question",
        "ValueError: beams is not a setting of the search: expected begin, end,",
        "DataError: ", "ValueError: videos hold a Tensor, expected paths",
        "ValueError: the weights of", "UserError: ", "ImportError: ",
    ], strict=True):  # fmt: skip
        assert (error or "").startswith(message), error


def test_an_old_or_missing_package_is_named() -> None:
    assert find_old("numpy", "1.0") == ""
    assert re.fullmatch(r"numpy [\d.]+ is too old, expected at least 99\.1", find_old("numpy", "99.1"))
    assert find_old("transformer5", "1") == "the package transformer5 is not installed"


def test_the_card_is_valid_on_the_hub(exported: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(exported / "hub" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "visual-question-answering"
    assert card.data.base_model == ["openai/clip-vit-large-patch14", "bert-large-uncased"]
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("answers", "accuracy", 0.25)
