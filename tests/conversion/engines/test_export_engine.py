"""Exported programs compute what our model computes, in engines that have neither it nor this package."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.digitworld import vocabulary_texts
from data_pipelines.tokenizers import train_wordpiece
from mplug2_jax.cli.common import restore_run
from mplug2_jax.conversion.engines import onnx, stablehlo
from mplug2_jax.conversion.engines.export_engine import export_engine
from mplug2_jax.conversion.import_plan import plan_import
from mplug2_jax.conversion.import_weights import run_import
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.generation.decode import generate
from mplug2_jax.objectives.forward import ForwardPass
from mplug2_jax.recipes.released import released_run
from tests.cli.conftest import mplug2, save_random_run
from tests.cli.test_bad_input import error_of
from tests.conftest import REPOSITORY
from tests.runs import small_model, small_run
from tests.weights import official_config, official_file

QUESTION = "who is singing?"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the work directory of a model of random weights that answers questions."""
    streams = {name: stream for name, stream in small_run().streams.items() if name != "text"}
    # With smaller weights, biases or one decoder layer it would repeat the same token.
    config = small_run(streams=streams, model=small_model(universal_layers=2, decoder_layers=2))
    return save_random_run(tmp_path_factory.mktemp("engines") / "run", config, scale=2.0, biases=False)


@pytest.fixture(scope="module")
def exports(run: Path) -> Path:
    """Return the folder in which the programs of docs/weights.md run: the exports, and clip.npy."""
    np.save(run.parent / "clip.npy", np.random.default_rng(0).integers(0, 256, (1, 2, 16, 16, 3), np.uint8))
    return run.parent


def greedy(run: Path, frames: Any) -> list[int]:
    """Return the answer of our greedy search."""
    spec, params, _, tokenizer = restore_run(argparse.Namespace(workdir=run, step=None, overrides=[]))
    question = jnp.asarray([tokenizer.encode(QUESTION)])
    batch = {"frames": jnp.asarray(frames), "instruction": question, "instruction_mask": question > 0}
    search = SearchConfig(num_beams=1, max_length=spec.config.tasks.search.max_length)

    @jax.jit
    @spec.model_def.with_precision
    def answer(params: Any) -> Any:
        forward = ForwardPass(spec.model_def.bind(params), batch)
        return generate(forward.model.decoder, *forward.instruction_memory, search, spec.context.tokens)

    with jax.set_mesh(spec.mesh):
        output = answer(params)
    ids: list[int] = output.ids[0, 0, : int(output.lengths[0, 0])].tolist()
    return ids


def program(format: str) -> str:
    """Return the program of docs/weights.md that runs an export."""
    page = (REPOSITORY / "docs" / "weights.md").read_text()
    (found,) = (p for p in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if f"exports/{format}/" in p)
    return found


def export(run: Path, format: str, *words: str) -> None:
    """Export with the command, which compares with our model."""
    outcome = mplug2(
        "convert", "export", run, "--to", run.parent / "exports" / format, "--format", format, "--verify", *words
    )
    assert outcome.status == 0, outcome
    assert "compared with our model: 0 of 3 taps differ" in outcome.out


@pytest.mark.slow
def test_onnx_gives_our_tokens(run: Path, exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed here")
    export(run, "onnx")
    monkeypatch.chdir(exports)
    names: dict[str, Any] = {}
    exec(program("onnx"), names)
    assert names["ids"] == greedy(run, np.load("clip.npy"))
    assert len(set(names["ids"])) > 2
    assert {path.name for path in (exports / "exports" / "onnx").iterdir()} == {
        "encode.onnx", "decode_step.onnx", "engine.json", "config.json", "vocab.txt"
    }  # fmt: skip
    for name, session in (("encode", names["encode"]), ("decode_step", names["decode_step"])):
        described = names["engine"]["programs"][name]
        for kind, nodes in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            assert [node.name for node in nodes] == list(described[kind])
            if kind == "inputs":
                assert {node.name: node.shape for node in nodes} == {
                    name: spec["shape"] for name, spec in described[kind].items()
                }


@pytest.mark.slow
def test_stablehlo_gives_our_tokens_in_a_process_with_jax_alone(run: Path, exports: Path) -> None:
    pytest.importorskip("flatbuffers", reason="flatbuffers is not installed here")
    export(run, "stablehlo")
    report = "import sys\nprint(json.dumps([ids, sorted({'flax', 'mplug2_jax', 'data_pipelines'} & set(sys.modules))]))"
    process = subprocess.run(
        [sys.executable, "-I", "-c", f"{program('stablehlo')}\n{report}"], cwd=exports, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) == [greedy(run, np.load(exports / "clip.npy")), []]


# A captioner reads no question; an image has no temporal units; a model in 16 bits computes nearly the same.
@pytest.mark.parametrize(
    ("format", "dtype"), [("stablehlo", "bfloat16"), pytest.param("onnx", "float16", marks=pytest.mark.slow)]
)
def test_images_captioners_and_sixteen_bits(tmp_path: Path, format: Any, dtype: str) -> None:
    needed = {"onnx": "onnxruntime", "stablehlo": "flatbuffers"}[format]
    pytest.importorskip(needed, reason=f"{needed} is not installed here")
    vocabulary = train_wordpiece(vocabulary_texts(60), 160).save(tmp_path / "tokenizer")
    source = official_file(
        tmp_path / "c.safetensors",
        official_config(vocab_size=160, vision_layers=1, universal_layers=1, decoder_layers=1),
        task="caption",
    )
    run_import(
        plan_import([source]), tmp_path / "ours", tokenizer=vocabulary,
        make_recipe=lambda model, task: released_run(model, task, "released"),
    )  # fmt: skip
    report = export_engine(tmp_path / "ours", tmp_path / "out", format, dtype=dtype, frames=1, verify=True)
    assert report.status == 0, report.summary()
    assert list(report.programs["encode"].inputs) == ["frames"]
    engine = json.loads((tmp_path / "out" / "engine.json").read_text())
    assert engine["programs"]["encode"]["inputs"]["frames"]["shape"] == ["batch", 1, 16, 16, 3]
    assert engine["tokens"] == {"pad": 0, "begin": 2, "end": 3}


def test_a_wrong_program_is_detected(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flatbuffers", reason="flatbuffers is not installed here")
    correct = stablehlo.decode_step

    def wrong(model: Any, inputs: Any) -> Any:
        return correct(model, inputs | {"position": inputs["position"] * 0})  # overwrites the cache

    monkeypatch.setattr(stablehlo, "decode_step", wrong)
    report = export_engine(run, tmp_path / "out", "stablehlo", verify=True)
    assert report.status == 1
    assert [row.tap for row in report.comparisons or () if not row.passed] == ["logits"]


def test_wrong_input_is_an_error_of_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*words: object, to: str = "out", workdir: Path = run) -> str:
        return error_of(mplug2("convert", "export", workdir, "--to", tmp_path / to, *words))

    onnx_format = ("--format", "onnx")
    outcome = mplug2("convert", "export", run, "--to", tmp_path / "out", "--format", "stablhlo")
    assert outcome.status == 2
    assert "did you mean 'stablehlo'?" in outcome.err
    assert "float32 or float16" in fail(*onnx_format, "--dtype", "bfloat16")
    assert "float32 or bfloat16" in fail("--format", "stablehlo", "--dtype", "float16")
    assert "--frames=0 must be at least 1" in fail(*onnx_format, "--frames", 0)
    assert fail(*onnx_format, "--shard-size", 1) == "--shard-size does not fit --format onnx; remove one of them"
    assert fail("--frames", 1) == "--frames does not fit --format torch; remove one of them"
    assert "names a file, but --format onnx writes a folder" in fail(*onnx_format, to="x.pth")

    with monkeypatch.context() as patch:
        patch.setattr(onnx.importlib.util, "find_spec", lambda name: None)
        assert fail(*onnx_format) == "--format onnx needs the package torch: pip install 'mplug2-jax[onnx]'"
        assert fail("--format", "stablehlo").endswith("flatbuffers: pip install 'mplug2-jax[stablehlo]'")
        patch.setattr(onnx.importlib.util, "find_spec", lambda name: True)
        bare = shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer"))
        assert "has no tokenizer" in fail(*onnx_format, workdir=bare)
    assert not (tmp_path / "out").exists()
