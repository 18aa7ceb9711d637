"""The commands that convert weights: output, files, and one-line errors."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mplug2_jax.conversion.files.open import open_source
from mplug2_jax.conversion.files.torch_files import TorchWriter
from tests.weights import assert_same, official_config, official_file

from .conftest import mplug2
from .test_bad_input import error_of


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an official question-answering checkpoint with its teacher and settings."""
    folder = tmp_path_factory.mktemp("official")
    return official_file(folder / "qa.safetensors", official_config(vocab_size=160), teacher=True)


@pytest.fixture(scope="module")
def imported(source: Path, tmp_path_factory: pytest.TempPathFactory, vocabulary: Path) -> Path:
    """Import it with a tokenizer."""
    folder = tmp_path_factory.mktemp("imported") / "ours"
    outcome = mplug2("convert", "import", source, "--to", folder, "--tokenizer", vocabulary)
    assert outcome.status == 0, outcome.err
    return folder


def fail(*words: object) -> str:
    """Run a command that must fail with one line, and return that line."""
    outcome = mplug2("convert", *words)
    assert outcome.err.count("\n") == 1
    return error_of(outcome)


def test_an_import_reports_every_tensor_and_writes_a_work_directory(
    source: Path, tmp_path: Path, vocabulary: Path
) -> None:
    outcome = mplug2("convert", "import", source, "--to", tmp_path / "ours", "--tokenizer", vocabulary)
    assert outcome.status == 0
    assert outcome.out.startswith("import: official videoqa with its teacher\n")
    assert re.search(r"^ +\d+ converted +[\d,]+ elements  the same values on both sides", outcome.out, re.MULTILINE)
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        "checkpoints", "config.json", "tokenizer", "official-rest.safetensors", "conversion-report.json",
        "conversion-report.html",
    }  # fmt: skip
    report = json.loads((tmp_path / "ours" / "conversion-report.json").read_text())
    assert report["tools"]["jax"]
    assert len(report["rows"]) == len(open_source(source).names())
    without_params = [row["disposition"] for row in report["rows"] if not row["params"]]
    assert set(without_params) == {"tied", "preserved"}
    assert all(row["sha256"] for row in report["rows"])
    page = (tmp_path / "ours" / "conversion-report.html").read_text()
    assert "text_decoder_m.cls.predictions.decoder.weight" in page
    assert "http" not in page.replace("http-equiv", "")  # no external resources


def test_an_import_can_be_evaluated(imported: Path) -> None:
    outcome = mplug2(
        "eval", "--workdir", imported, "--config.evaluations.video.data.sources.clips.max_records=8",
        "--config.tasks.search.num_beams=1", "--config.tasks.search.max_length=3",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert re.search(r"^video +accuracy ", outcome.out, re.MULTILINE)


def test_an_export_to_a_folder_follows_hugging_face(imported: Path, source: Path, tmp_path: Path) -> None:
    outcome = mplug2("convert", "export", imported, "--to", tmp_path / "hub")
    assert outcome.status == 0, outcome.err
    assert {path.name for path in (tmp_path / "hub").iterdir()} == {
        "model.safetensors", "config.json", "vocab.txt", "README.md", "conversion-report.json",
        "conversion-report.html", "inference.json", "run.py", "requirements.txt", "mplug2_torch", "data_pipelines",
        "mplug2_runtime.py", "configuration_mplug2.py", "modeling_mplug2.py", "processing_mplug2.py",
        "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json",
    }  # fmt: skip
    assert_same(tmp_path / "hub", source)
    settings, theirs = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "hub", source.parent))
    tokens = {"bos_token_id": 2, "eos_token_id": 3}  # of its tokenizer
    assert settings == theirs | tokens | {"architectures": ["Mplug2Model"], "auto_map": settings["auto_map"]}
    for reference in settings["auto_map"].values():
        module, name = reference.split(".")
        assert f"\nclass {name}(" in (tmp_path / "hub" / f"{module}.py").read_text()
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "Recipe `released_videoqa`, step 0 of 40000, from imported weights" in card

    failed = mplug2("convert", "export", imported, "--to", tmp_path / "other", "--base-model", "https://x/y")
    assert (failed.status, (tmp_path / "other").exists()) == (2, False)
    assert "--base-model 'https://x/y' is no name on the hub, expected one as openai/clip" in failed.err


def test_the_model_card_lists_results_of_new_and_old_runs(imported: Path, tmp_path: Path) -> None:
    run = shutil.copytree(imported, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))
    results = {
        "new.json": {"name": "new", "metrics": {"accuracy": 0.5}, "baselines": {"accuracy": 0.1}, "num_examples": 8},
        "old.json": {"name": "old", "figures": {"cider": 1.25}, "baselines": {}, "examples": 4},
    }
    (run / "evaluations" / "0").mkdir(parents=True)
    for name, result in results.items():
        (run / "evaluations" / "0" / name).write_text(json.dumps(result))
    assert mplug2("convert", "export", run, "--to", tmp_path / "hub").status == 0
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "| new | accuracy | 0.5000 | 0.1000 | 8 |\n| old | cider | 1.2500 | nan | 4 |" in card


def test_reports_and_options_of_older_versions_are_still_read(imported: Path, tmp_path: Path) -> None:
    run = shutil.copytree(imported, tmp_path / "run")
    content = json.loads((run / "conversion-report.json").read_text())
    content["format"] = content.pop("format_version") - 1
    fates = {"converted": "used", "preserved": "kept"}
    for row in content["rows"]:
        row["fate"] = fates.get(row["disposition"], row["disposition"])
        del row["disposition"]
        row["places"], row["why"] = row.pop("params"), row.pop("reason")
    (run / "conversion-report.json").write_text(json.dumps(content))
    assert mplug2("convert", "verify", run).status == 0
    leftover = shutil.move(run / "official-rest.safetensors", tmp_path / "kept.safetensors")
    file = tmp_path / "x.safetensors"
    assert mplug2("convert", "export", run, "--to", file, "--rest", leftover).status == 0
    assert "preserved" in (tmp_path / "conversion-report.json").read_text()


def test_verify_passes_and_names_the_first_tensor_that_changed(imported: Path, tmp_path: Path) -> None:
    assert mplug2("convert", "verify", imported / "conversion-report.json").status == 0
    assert mplug2("convert", "export", imported, "--to", tmp_path / "x.safetensors").status == 0
    report = tmp_path / "conversion-report.json"
    good = mplug2("convert", "verify", report)
    assert good.status == 0
    assert re.fullmatch(rf"{report}: all [\d,]+ tensors are unchanged\n", good.out)
    data = bytearray((tmp_path / "x.safetensors").read_bytes())
    names = open_source(tmp_path / "x.safetensors").names()
    data[-1] ^= 1  # the last byte of the last tensor
    (tmp_path / "x.safetensors").write_bytes(data)
    bad = mplug2("convert", "verify", tmp_path)
    assert bad.status == 1
    assert f"{names[-1]} has changed; the {len(names) - 1} tensors before it are unchanged" in bad.out


def test_verify_detects_a_changed_checkpoint(imported: Path, tmp_path: Path) -> None:
    """Arrays are stored uncompressed: a flipped bit is restored silently, and only the report detects it."""
    copy = shutil.copytree(imported, tmp_path / "copy")
    largest = max((copy / "checkpoints" / "0" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)
    outcome = mplug2("convert", "verify", copy)
    assert (outcome.status == 1 and "has changed" in outcome.out) or (outcome.status == 2 and "damaged" in outcome.err)


def test_inspect_shows_parts_and_shapes_of_every_layout(imported: Path, source: Path) -> None:
    ours, theirs = mplug2("convert", "inspect", imported, "--depth", 2), mplug2("convert", "inspect", source)
    assert ours.status == theirs.status == 0
    for out, title in (
        (ours.out, "checkpoint of step 0: "),
        (theirs.out, "official mPLUG-2 videoqa with its teacher: "),
    ):
        assert out.startswith(title)
        assert out.splitlines()[1] == "parts: vision, temporal, text, universal, fusion, decoder"
    assert "├─ visn_emb_norm  2 tensors, 128 elements, 0.5 kB, float32" in theirs.out


def test_diff_compares_a_run_with_its_export_and_finds_what_changed(
    imported: Path, source: Path, tmp_path: Path
) -> None:
    assert mplug2("convert", "export", imported, "--to", tmp_path / "hub").status == 0
    equal = mplug2("convert", "diff", imported, tmp_path / "hub")
    assert (equal.status, equal.err) == (0, "")
    assert equal.out.startswith(f"A: {imported}: checkpoint of step 0, as official videoqa with its teacher\nB: ")
    assert re.search(r"^text_encoder +\d+ +0 +0 +0 +0 +0 +0 +0$", equal.out, re.MULTILINE)
    changed = write_changed(source, tmp_path / "changed", untie)
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    different = mplug2("convert", "diff", imported, changed, "--out", page, "--json", numbers)
    assert (different.status, different.err) == (1, "")
    name = "text_decoder.cls.predictions.decoder.weight"
    assert f"{name} differs: by 1.0e+00, " in different.out
    assert different.out.endswith(" equal, 1 differ, 0 only in A, 0 only in B\n")
    assert name in page.read_text()
    assert json.loads(numbers.read_text())["towers"]["text_decoder"]["differing"][0]["name"] == name


# Errors


def test_diff_of_what_is_missing_or_holds_no_weights_is_an_error(source: Path, tmp_path: Path) -> None:
    missing = tmp_path / "nothing.pth"
    assert fail("diff", source, missing) == f"weights file {missing} does not exist"
    assert fail("diff", tmp_path, source).startswith(f"{tmp_path} holds no weights;")
    assert fail("diff", source, source, "--out", source).startswith(f"--out {source} exists;")


def test_existing_files_are_replaced_only_with_overwrite(source: Path, imported: Path, tmp_path: Path) -> None:
    existing = tmp_path / "existing"
    existing.mkdir()
    (existing / "thesis.txt").write_text("years of work")
    message = f"{existing} exists; choose another path, or replace it with --overwrite"
    assert fail("import", source, "--to", existing) == message
    assert fail("export", imported, "--to", existing) == message
    (tmp_path / "x.pth").write_text("precious")
    assert fail("export", imported, "--to", tmp_path / "x.pth").startswith(f"{tmp_path / 'x.pth'} exists;")
    assert (existing / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "x.pth").read_text() == "precious"
    assert mplug2("convert", "export", imported, "--to", existing, "--overwrite").status == 0
    files = filter(Path.is_file, existing.iterdir())
    assert {path.suffix for path in files} == {".safetensors", ".json", ".txt", ".md", ".html", ".py"}
    assert not (existing / "thesis.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["existing", "x.pth"]


def write_changed(source: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a checkpoint and change its tensors."""
    reader = open_source(source)
    tensors = {name: reader.read(name) for name in reader.names()}
    change(tensors)
    folder.mkdir(exist_ok=True)
    shutil.copyfile(source.with_name("config.json"), folder / "config.json")
    from mplug2_jax.conversion.files.sources import TensorInfo

    writer = TorchWriter(folder / "x.pth", {name: TensorInfo(x.shape, x.dtype) for name, x in tensors.items()})
    for name, value in tensors.items():
        writer.write(name, value)
    writer.close()
    return folder / "x.pth"


def insert_nan(tensors: dict[str, Any]) -> None:
    name = "fusion_encoder.encoder.layer.3.output.dense.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, :2] = np.nan


def shrink(tensors: dict[str, Any]) -> None:
    name = "visn_emb_norm.weight"
    tensors[name] = tensors[name][:5]


def rename(tensors: dict[str, Any]) -> None:
    tensors["text_encoder.encoder.layer.9.attention.self.query.weight"] = np.zeros(3, np.float32)
    del tensors["visn_emb_norm.bias"]


def untie(tensors: dict[str, Any]) -> None:
    name = "text_decoder.cls.predictions.decoder.weight"
    tensors[name] = tensors[name] + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (insert_nan, "fusion_encoder.encoder.layer.3.output.dense.weight: 2 of 6,144 values are NaN or infinite"),
        (shrink, "weights of another size: visn_emb_norm.weight [5] does not fit universal/visual_norm/scale [64]"),
        (rename, "1 missing (visn_emb_norm.bias) and 1 unexpected (text_encoder.encoder.layer.9.attention.self.query"),
        (untie, "text_decoder.cls.predictions.decoder.weight is tied to text_decoder.bert.embeddings.word_embeddings"),
    ],
)
def test_invalid_weights_are_named_and_nothing_is_written(
    source: Path, tmp_path: Path, change: Callable[..., None], message: str
) -> None:
    assert message in fail("import", write_changed(source, tmp_path / "source", change), "--to", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_ambiguous_checkpoint_needs_the_task(source: Path, tmp_path: Path) -> None:
    path = official_file(tmp_path / "x.pth", official_config(), settings=False)
    message = fail("import", path, "--to", tmp_path / "ours")
    assert "choose with --task caption or --task videoqa" in message
    message = fail("import", path, "--task", "caption", "--to", tmp_path / "ours")
    assert "these weights have width=64, expected one of the release's (768, 1024); put the config.json" in message


def test_a_tokenizer_larger_than_the_vocabulary_is_an_error(tmp_path: Path, vocabulary: Path) -> None:
    path = official_file(tmp_path / "s" / "x.safetensors", official_config(vocab_size=120))
    message = fail("import", path, "--to", tmp_path / "ours", "--tokenizer", vocabulary)
    assert message.startswith("config.model.vocab_size=120 is too small for the tokenizer's 160 tokens")


def test_unknown_parts_and_invalid_sizes_are_errors(source: Path, tmp_path: Path) -> None:
    to = ("--to", tmp_path / "ours")
    assert fail("import", source, *to, "--parts", "vision,texts").startswith("part 'texts' is unknown: did you mean")
    assert "config.model.image_size=20 is not a multiple of" in fail("import", source, *to, "--image-size", 20)
    assert fail("import", tmp_path / "nothing.pth", *to) == f"weights file {tmp_path / 'nothing.pth'} does not exist"
    assert "--shard-size=0.0 must be at least" in fail("export", source, "--to", tmp_path / "x.pth", "--shard-size", 0)


def test_exporting_an_average_needs_one_in_the_checkpoint(tmp_path: Path) -> None:
    path = official_file(tmp_path / "s" / "x.safetensors", official_config(), task="caption")
    assert mplug2("convert", "import", path, "--to", tmp_path / "ours").status == 0
    assert fail("export", tmp_path / "ours", "--to", tmp_path / "x.pth", "--ema").endswith("export without --ema")
    assert fail("export", path.parent, "--to", tmp_path / "x.pth").startswith(f"{path.parent} holds no checkpoint;")


def test_too_little_disk_space_is_an_error_before_anything_is_written(
    source: Path, imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert re.fullmatch(r"the disk of .* has 0\.0 GB free, but 0\.0 GB are needed; free some space", fail(
        "import", source, "--to", tmp_path / "ours"
    ))  # fmt: skip
    assert fail("export", imported, "--to", tmp_path / "hub").endswith("free some space")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_partial_files(imported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = []

    def full(*args: Any) -> int:
        writes.append(1)
        if len(writes) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", full)
    message = fail("export", imported, "--to", tmp_path / "out" / "x.safetensors")
    assert message == f"the disk of {tmp_path / 'out'} is full, nothing was written; free some space"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_killed_process_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    source = official_file(tmp_path / "s" / "x.safetensors", official_config(vision_layers=24), teacher=True)
    words = [sys.executable, "-m", "mplug2_jax.cli.main", "convert", "import", source, "--to", tmp_path / "ours"]
    process = subprocess.Popen(words, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".ours.*.partial/checkpoints/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "ours").exists()
