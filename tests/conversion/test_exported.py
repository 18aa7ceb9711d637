"""An exported folder is a program of its own: it computes what the project computes, without importing it or JAX."""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.config import ExampleConfig
from data_pipelines.examples import encode_answer
from data_pipelines.media import file_media
from data_pipelines.visual import load_visual
from mplug2_jax.cli.common import restore_run
from mplug2_jax.generation.rank import rank_answers
from mplug2_jax.inference import generator
from mplug2_jax.inference.media import visual_config
from mplug2_jax.objectives.forward import ForwardPass
from tests.cli.conftest import mplug2
from tests.close import assert_close
from tests.conftest import REPOSITORY

PROGRAM = """
import contextlib, io, json, pathlib, runpy, sys

ABSENT = {
    "absl", "flax", "grain", "jax", "jaxlib", "jaxtyping", "mplug2_jax", "optax", "orbax", "sentencepiece", "torchao",
}


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


sys.meta_path.insert(0, Absent())
import functools

import torch

torch.compile = functools.partial(torch.compile, backend="aot_eager")  # which needs no C++ compiler
outcomes = []
for folder, *words in json.loads(sys.argv[1]):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("data_pipelines", "mplug2_torch")]:
        del sys.modules[name]
    sys.argv = ["run.py", *words]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_path(f"{folder}/run.py", run_name="__main__")
        except SystemExit as stop:
            outcomes.append([stop.code, out, err])
outcomes = [[status, out.getvalue(), err.getvalue()] for status, out, err in outcomes]
print(json.dumps({"outcomes": outcomes, "imported": sorted(ABSENT & set(sys.modules))}))
"""
QUESTION, CANDIDATES = "which digit moves?", ("a red digit", "blue", "up")


def variant(folder: Path, name: str, file: str, changes: Mapping[str, Any] | None = None) -> Path:
    """Copy the export with changes to a JSON file, or without a file."""
    copy = shutil.copytree(folder / "hub", folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    if changes is None:
        (copy / file).unlink()
    else:
        (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | changes))
    return copy


@pytest.mark.slow
def test_the_program_computes_what_the_project_computes(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = exported
    from mplug2_jax.conversion.exported.model import ExportedModel

    clip, picture = folder / "a.mp4", folder / "a.png"
    model = ExportedModel(folder / "hub")
    captions = model.generate(clip), model.generate(picture)
    assert captions[0].ids != captions[1].ids
    with monkeypatch.context() as patch:
        patch.setattr(generator, "make_detokenizer", lambda config, tokenizer: str)
        ours = mplug2("generate", "--workdir", folder / "run", clip, picture, "--quiet").out
    assert ours == f"{clip}: {captions[0].ids}\n{picture}: {captions[1].ids}\n"
    features, ranks = run_ours(folder / "run", clip)

    assert model.generate_batch([clip, picture, clip]) == [*captions, captions[0]]

    no_weights = variant(folder, "no_weights", "model.safetensors")
    no_code = variant(folder, "no_code", "mplug2_torch/conversion/torch_runtime/vision.py")
    no_settings = variant(folder, "no_settings", "inference.json")
    search = json.loads((folder / "hub" / "inference.json").read_text())["search"]
    too_long = variant(folder, "too_long", "inference.json", {"search": search | {"max_length": 999}})
    other = variant(folder, "other", "config.json", {"decoder_layers": 2})
    captioner = variant(folder, "captions", "config.json", {"task": "caption"})
    old = variant(folder, "old", "conversion-report.html")
    (old / "requirements.txt").write_text("torch>=99\n")
    hub = folder / "hub"
    good, failed = run_programs(
        [
            (hub, "caption", clip, picture, "--batch-size", 3), (hub, "answer", clip, QUESTION),
            (captioner, "caption", clip),
            (hub, "rank", clip, *CANDIDATES, "--question", QUESTION), (hub, "embed", clip),
            (hub, "caption", clip, picture, "--compile"),
        ],
        [
            (hub, "caption", folder / "sound.wav"), (hub, "caption", folder / "none.mp4"),
            (hub, "caption", clip, "--device", "abacus"), (captioner, "answer", clip, QUESTION),
            (no_weights, "caption", clip), (no_settings, "caption", clip), (no_code, "caption", clip),
            (other, "caption", clip), (old, "caption", clip), (hub, "caption", clip, "--int8"),
            (too_long, "caption", clip),
        ],
    )  # fmt: skip
    assert good[0] == f"{clip}: {captions[0].text}\n{picture}: {captions[1].text}\n"
    assert good[5] == good[0]
    assert good[1] == f"{clip}: {model.generate(clip, QUESTION).text}\n"
    assert good[2] == f"{clip}: {ExportedModel(captioner).generate(clip).text}\n"
    lines = [line.split("  ") for line in good[3].splitlines()]
    assert [text for _, text in lines] == [text for text, _ in ranks]
    np.testing.assert_allclose([float(p) for p, _ in lines], [p for _, p in ranks], atol=1e-4)
    printed = json.loads(good[4])
    assert printed["file"] == str(clip)
    assert_close(np.asarray(printed["features"]), features)
    for error, message in zip(failed, [
        r".*sound\.wav has no video stream, only audio or other data; replace or remove the file",
        r".*none\.mp4 does not exist or is not a file; expected an image or a video",
        r"the device 'abacus' cannot be used \(.*\); choose another, as 'cpu'",
        r"this model captions, and has no part that reads a question; ask without one",
        r".*no_weights holds no weights file; expected one .*", r".*inference\.json does not exist; copy the whole .*",
        r".*no_code is not complete, copy it again: No module named .*\.vision'",
        r".*model\.safetensors does not match the model: \d+ missing .*; nothing was loaded\. Check the sizes",
        r"torch [\d.+a-z]+ is too old, expected at least 99: pip install -r .*requirements\.txt",
        r"int8 needs the package torchao \(.*\): pip install torchao",
        r"generating 999 tokens exceeds max_positions=\d+; lower max_length",
    ], strict=True):  # fmt: skip
        assert re.fullmatch(f"error: {message}\n", error)


def test_weights_of_8_bits_are_close(exported: Path) -> None:
    from mplug2_jax.conversion.exported.model import ExportedModel

    pytest.importorskip("torchao", reason="torchao is not installed here")
    exact, rounded = (ExportedModel(exported / "hub", int8=int8) for int8 in (False, True))
    assert rounded.generate(exported / "a.mp4").ids[0] == exact.generate(exported / "a.mp4").ids[0]
    features = np.asarray(exact.embed(exported / "a.mp4"))
    error = np.abs(np.asarray(rounded.embed(exported / "a.mp4")) - features).max() / np.abs(features).max()
    assert 0 < error < 0.1


def run_ours(workdir: Path, clip: Path) -> tuple[Any, list[tuple[str, float]]]:
    """Return the pooled features of a clip, and the ranked candidates, as the project computes them."""
    spec, params, _, tokenizer = restore_run(argparse.Namespace(workdir=workdir, step=None, overrides=[]))
    frames = load_visual(file_media(clip), visual_config(spec.config), np.random.default_rng(0)).frames
    instruction = np.asarray([tokenizer.encode(QUESTION)])
    batch = {"frames": frames[None], "instruction": instruction, "instruction_mask": np.ones_like(instruction, bool)}
    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    rows = [encode_answer(text, ExampleConfig(), tokenizer) for text in CANDIDATES]
    table = jnp.asarray([[*row, *[0] * (max(map(len, rows)) - len(row))] for row in rows])

    @jax.jit
    @spec.model_def.with_precision
    def compute(params: Any) -> Any:
        forward = ForwardPass(spec.model_def.bind(params), batch)
        ranks = rank_answers(
            forward.model.decoder, *forward.instruction_memory, table, table != 0, num_candidates=len(rows)
        )
        return forward.visual.mean(1)[0], ranks

    with jax.set_mesh(spec.mesh):
        features, (order, scores) = compute(params)
    return features, [(CANDIDATES[i], p) for i, p in zip(order[0].tolist(), scores[0].tolist(), strict=True)]


def run_programs(good: Sequence[tuple[Any, ...]], bad: Sequence[tuple[Any, ...]]) -> tuple[list[str], list[str]]:
    """Run the programs of folders in a process without our packages; return what good ones print, and errors of bad."""
    commands = json.dumps([[str(word) for word in words] for words in (*good, *bad)])
    process = subprocess.run([sys.executable, "-I", "-c", PROGRAM, commands], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert not result["imported"]
    outcomes = result["outcomes"]
    assert [(status, bool(out), bool(err)) for status, out, err in outcomes] == (
        [(0, True, False)] * len(good) + [(2, False, True)] * len(bad)
    ), outcomes
    return [out for _, out, _ in outcomes[: len(good)]], [err for _, _, err in outcomes[len(good) :]]


def test_the_card_lists_the_code_which_is_the_project_s(exported: Path) -> None:
    hub = exported / "hub"
    card = (hub / "README.md").read_text()
    listed = dict(re.findall(r"^\| (\S+) \| ([0-9a-f]{64}) \|$", card, re.MULTILINE))
    assert listed == {name: hashlib.sha256((hub / name).read_bytes()).hexdigest() for name in listed}
    assert set(listed) == {path.relative_to(hub).as_posix() for path in hub.rglob("*.py")} | {"requirements.txt"}
    for name in listed:
        source = REPOSITORY / name.replace("mplug2_torch/", "mplug2_jax/")
        source = source if source.exists() else REPOSITORY / "mplug2_jax" / "conversion" / "exported" / name
        assert (hub / name).read_bytes() == source.read_bytes()
    project = (REPOSITORY / "pyproject.toml").read_text()
    assert all(f'"{requirement}"' in project for requirement in (hub / "requirements.txt").read_text().split())
