"""Invalid input: status 2, a one-line error that names it and the remedy, and nothing is written."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Outcome, TrainedRun, mplug2, snapshot

Refused = Callable[..., str]


def error_of(outcome: Outcome) -> str:
    """Return the error message of a command that was refused."""
    assert outcome.status == 2, outcome
    (line,) = outcome.err.splitlines()
    assert line.startswith("mplug2: error: ")
    assert "Traceback" not in line
    return line.removeprefix("mplug2: error: ")


@pytest.fixture
def refused(trained: TrainedRun, tmp_path: Path) -> Refused:
    """Return a function that runs a command, which must fail and change no file, and returns its error message."""

    def run(*words: object) -> str:
        before = snapshot(trained.workdir), snapshot(tmp_path)
        outcome = mplug2(*words)
        assert (snapshot(trained.workdir), snapshot(tmp_path)) == before
        return error_of(outcome)

    return run


# Configs


CONFIGS = {
    "modle.width=3": "config.modle is not a field: did you mean 'model'? (valid: checkpoint, ",
    "model.widht=3": "config.model.widht is not a field: did you mean 'width'?",
    "model.width=wide": "config.model.width=wide is str, expected int (like 32)",
    "optimizer.learning_rate=none": "config.optimizer.learning_rate=None is NoneType, expected float",
    "model": "cannot read '--config.model': write an override as --config.field=value",
    "model.dtype=float16": "config.model.dtype='float16': did you mean 'bfloat16'? (valid: bfloat16, float32)",
    "steps=0": "config.steps=0 must be at least 1",
    "seed=-1": "config.seed=-1 must be at least 0",
    "checkpoint.keep_last=0": "config.checkpoint.keep_last=0 must be at least 1",
    "grad_accum_steps=3": "config.streams.text.data.batch_size=8 is not a multiple of config.grad_accum_steps=3",
    "model.heads=0": "config.model.heads=0 must be at least 1",
    "streams.text.data.mixture_temperature=-1": "config.streams.text.data: mixture_temperature=-1.0 must be above 0",
    "model.dropout=2.0": "config.model.dropout=2.0 must be between 0 and 0.99",
    "optimizer.learning_rate=-1": "config.optimizer.learning_rate=-1.0 must be at least 0",
    "optimizer.b2=1.5": "config.optimizer.b2=1.5 must be between 0 and 1",
    "schedule.decay_steps=5": "config.schedule.decay_steps=5 is not read by kind='cosine': set it to 0, or kind to",
    "schedule.warmup_steps=-1": "config.schedule.warmup_steps=-1 must be at least 0",
    "tasks.search.num_beams=0": "config.tasks.search.num_beams=0 must be at least 1",
    "tasks.mlm.mask_rate=15": "config.tasks.mlm.mask_rate=15.0 must be between 0 and 1",
    "tasks.vlm.group_size=-1": "config.tasks.vlm.group_size=-1 must be at least 0",
    "model.heads=5": "config.model.width=32 does not divide into config.model.heads=5 heads",
    "model.vocab_size=50": "config.model.vocab_size=50 is too small for the tokenizer's 160 tokens; raise it to at "
    "least 160",
    "model.max_positions=20": "config.streams.text.data.examples.text_length=24 exceeds config.model.max_positions=20",
    "mesh.fsdp=3": "config.mesh.fsdp=3 needs 3 devices, but there are 8; set one axis to -1",
    "mesh.tensor=3": "config.mesh.tensor=3: 3 does not divide the 8 devices; choose sizes",
    "streams.text.data.batch_size=12": "config.streams.text.data.batch_size=12 does not split over the mesh's 8 batch "
    "shards (fsdp=8); use 8 or 16",
    "streams.text.data.batch_size=0": "config.streams.text.data.batch_size=0 must be at least 1",
    "streams.text.data.mixture_stages=[{'start':1}]": "config.streams.text.data.mixture_stages[0].start is not a field"
    ": did you mean 'start_step'?",
    "streams.text.data.batch_ramp=[{'last_step':2,'batch_size':12}]": "config.streams.text.data.batch_ramp[0]."
    "batch_size=12 does not split over the mesh's 8 batch shards (fsdp=8); use 8 or 16",
    "streams.text.data.batch_ramp=[{'last_step':2,'batch_size':0}]": "data.batch_ramp[0].batch_size=0 must be at "
    "least 1",
    "streams.text.data.num_threads=-1": "config.streams.text.data.num_threads=-1 must be at least 0",
    "streams.text.data.num_workers=-2": "config.streams.text.data.num_workers=-2 must be at least 0",
    "streams.text.data.sources.digits.max_records=0": "config.streams.text.data: the source digitworld (text) is "
    "empty: source.max_records=0, expected at least 1",
    "streams.text.data.sources.digits.kind=sound": "data.sources.digits.kind='sound': valid: image, text, video",
    "streams.text.data.sources.digits.kind=image": "config.streams.text.data: record digitworld/image/train/0/",
    "streams.text.data.examples.text_length=1": "config.streams.text.data: max_length is 1, expected at least 2",
    "streams.text.data.examples.text_length=0": "config.streams.text: task 'mlm' reads text, text_mask, but its ",
    "streams.text.data.examples.instructions.entailment.templates=('{x}',)": "instruction template '{x}' of kind "
    "'entailment' fails ('x'); valid placeholders: {premise}, {hypothesis}",
    "streams.text.data.examples.instructions.entailment.templates=()": "instructions.entailment has 0 templates",
    "streams.text.data.examples.instructions.entailment.weight=0": "entailment all have weight 0; expected one above 0",
    "evaluations.masked_words.data.batch_size=12": "config.evaluations.masked_words.data.batch_size=12 does not split",
    "evaluations.masked_words.per_device_batch_size=0": "masked_words.per_device_batch_size=0 must be at least 1",
    "evaluations.masked_words.data.batch_size=0": "config.evaluations.masked_words.data.batch_size=0 must be at least",
    "evaluations.masked_words.data.sources.digits.max_records=0": "masked_words.data: the source digitworld "
    "(text, heldout) is empty: source.max_records=0, expected at least 1",
    "evaluations.masked_words.task=mlmm": "config.evaluations.masked_words.task='mlmm': did you mean 'mlm'?",
    "evaluations.masked_words.task=answer": "config.evaluations.masked_words: task 'answer' reads instruction, ",
    "tokenizer.path=nowhere": "nowhere does not exist; expected a vocab.txt, a *.model file or a directory with one",
}


@pytest.mark.parametrize(("override", "message"), CONFIGS.items(), ids=CONFIGS)
def test_a_wrong_config_is_refused_before_anything_is_written(
    override: str, message: str, refused: Refused, trained: TrainedRun, tmp_path: Path
) -> None:
    word = f"--config.{override}"
    assert message in refused("train", "--config", trained.recipe, "--workdir", tmp_path / "new", word)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("demmo", "recipe 'demmo' is neither a file nor a shipped recipe: did you mean 'demo'? "),
        ("runs/mine.py", "recipe 'runs/mine.py' is neither a file nor a shipped recipe: "),
        ("demo:large", "recipe demo:large: valid: long, short"),
    ],
)
def test_an_unknown_recipe_is_refused(name: str, message: str, refused: Refused, tmp_path: Path) -> None:
    assert message in refused("train", "--config", name, "--workdir", tmp_path / "new")


# Work directories


def test_a_folder_that_holds_something_else_is_not_trained_in(
    refused: Refused, trained: TrainedRun, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    train = ("train", "--config", trained.recipe, "--workdir")
    message = "is not empty and holds no run; choose a new folder"
    assert refused(*train, tmp_path) == f"--workdir {tmp_path} {message}"
    assert refused(*train, tmp_path / "thesis.txt").startswith(f"--workdir {tmp_path / 'thesis.txt'} is ")
    inside = tmp_path / "thesis.txt" / "x"
    assert refused(*train, inside) == f"--workdir {inside} cannot be used: {inside}: Not a directory; choose another"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steps=1"], "another config: steps was 2 and is 1. Use the same config to resume it, or a new --workdir"),
        (["seed=1", "name=x"], "another config: name was 'demo' and is 'x'; seed was 0 and is 1. Use"),
        (["model.width=64"], "another config: model.width was 32 and is 64. Use"),
        ([f"model.{n}=64" for n in ("width", "vision_width", "num_latents", "contrastive_width")], ", and 1 more. Use"),
        (["mesh.fsdp=3"], "config.mesh.fsdp=3 needs 3 devices"),
        (["model.width=64", "--force-change config.model"], " is of another size: "),
        (["freeze=()", "model.num_classes=3", "--force-change config.freeze"], "config.freeze changes nothing: set it"),
        (["optimizer.clip_norm=0", "--force-change config.optimizer"], "nor turn clipping on or off (an optimizer"),
        (["steps=1", "--force-change config.steps"], "config.steps=1 is less than the 2 steps that are done already"),
        (["log_every=5", "evaluations.more_words.data.batch_size=12"], "batch_size=12 does not split"),
    ],
)
def test_a_run_is_not_resumed_with_what_does_not_fit_it(
    overrides: list[str], message: str, refused: Refused, trained: TrainedRun
) -> None:
    words = [word for each in overrides for word in (each.split() if each[0] == "-" else [f"--config.{each}"])]
    assert message in refused("train", "--config", trained.recipe, "--workdir", trained.workdir, *words)


READERS = {"eval": ["eval", "--workdir"], "generate": ["generate", "--workdir"], "report": ["report"]}


@pytest.mark.parametrize("name", READERS)
def test_a_folder_without_a_run_is_refused(name: str, refused: Refused, media: Path, tmp_path: Path) -> None:
    files = [media / "a.txt"] * (name == "generate")
    for folder in (tmp_path, tmp_path / "missing"):
        message = refused(*READERS[name], folder, *files)
        assert message.startswith(f"{folder} holds no run: config.json is missing; give ")


DAMAGED = {
    "truncated": (lambda text: text[: len(text) // 2], "is not valid JSON"),
    "empty": (lambda text: "", "is not valid JSON"),
    "a list": (lambda text: "[]", "holds a "),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_config_is_refused_by_its_name(
    name: str, damage: Callable[[str], str], message: str, refused: Refused, workdir: Path, media: Path
) -> None:
    config = workdir / "config.json"
    config.write_text(damage(config.read_text()))
    error = refused(*READERS[name], workdir, *[media / "a.txt"] * (name == "generate"))
    assert error.startswith(f"{config} {message}")
    assert "restore it" in error


def edit(workdir: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a run's config behind its back."""
    config = workdir / "config.json"
    values = json.loads(config.read_text())
    change(values)
    config.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("model"), "config.json is damaged or of another version: config lacks model"),
        (
            lambda c: c["model"].update(depth=3),
            "config.json is damaged or of another version: config.model.depth is not",
        ),
        (lambda c: c.update(steps="two"), "config.json is damaged or of another version: config.steps='two' is str"),
        (lambda c: c["model"].update(width=64), "is of another size: params/"),
        (lambda c: c["model"].update(text_layers=2), "is of another size: params/text/layers/"),
        (lambda c: c["model"].update(vocab_size=50), "config.model.vocab_size=50 is too small for the tokenizer's 160"),
    ],
)
def test_a_config_that_was_changed_does_not_fit_its_checkpoint(
    change: Callable[[dict[str, Any]], object], message: str, refused: Refused, workdir: Path
) -> None:
    edit(workdir, change)
    assert message in refused("eval", "--workdir", workdir)


def test_a_part_that_only_the_config_has_is_missed_where_it_is_read(refused: Refused, workdir: Path) -> None:
    edit(workdir, lambda values: values["streams"]["text"]["objectives"].update(ilm=1.0))
    (workdir / "a.txt").write_text("a red digit")
    assert "lacks params/decoder/" in refused("generate", "--workdir", workdir, workdir / "a.txt")
    assert mplug2("eval", "--workdir", workdir).status == 0  # masked words need no decoder


# Checkpoints


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_a_run_without_a_checkpoint_is_refused(folder: str, refused: Refused, workdir: Path) -> None:
    shutil.rmtree(workdir / "checkpoints")
    if folder == "empty":
        (workdir / "checkpoints").mkdir()
    message = f"{workdir / 'checkpoints'} holds no checkpoint; train first, or check the path"
    assert refused("eval", "--workdir", workdir) == message


def test_a_step_that_was_not_saved_is_refused(refused: Refused, trained: TrainedRun) -> None:
    message = refused("eval", "--workdir", trained.workdir, "--step", 7)
    assert message == f"{trained.workdir / 'checkpoints'} holds no checkpoint of step 7; there are [2]"


def largest(folder: Path) -> Path:
    return max(folder.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)


BROKEN = {
    "metadata": (lambda step: step / "meta" / "metadata", "is incomplete: meta/metadata is missing or damaged"),
    "tree": (lambda step: step / "state" / "_METADATA", ""),
    "manifest": (lambda step: step / "state" / "manifest.ocdbt", "is damaged ("),
    "index": (lambda step: largest(step / "state" / "d"), "is damaged ("),
}


@pytest.mark.parametrize("how", ["deleted", "truncated", "emptied"])
@pytest.mark.parametrize(("find", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_refused(
    find: Callable[[Path], Path], message: str, how: str, refused: Refused, workdir: Path
) -> None:
    step = workdir / "checkpoints" / "2"
    path = find(step)
    data = path.read_bytes()
    path.unlink()
    if how != "deleted":
        path.write_bytes(data[: len(data) // 2] if how == "truncated" else b"")
    error = refused("eval", "--workdir", workdir)
    assert error.startswith(f"checkpoint {step} is {message.removeprefix('is ')}")
    assert error.endswith("; it is the only one: restore it from a copy, or move it away to train without it")
    assert "object has no attribute" not in error


def test_a_checkpoint_that_lost_its_data_is_neither_read_nor_resumed(trained: TrainedRun, workdir: Path) -> None:
    for path in (workdir / "checkpoints" / "2" / "state" / "ocdbt.process_0" / "d").iterdir():
        path.write_bytes(b"")
    before = snapshot(workdir / "checkpoints")
    for words in (["eval"], ["train", "--config", trained.recipe]):
        error = error_of(mplug2(*words, "--workdir", workdir))
        assert re.match(rf"checkpoint {re.escape(str(workdir))}/checkpoints/2 is damaged \(.+\); it is the only", error)
        assert "TensorStore details" not in error
    assert snapshot(workdir / "checkpoints") == before


def test_of_several_steps_the_others_are_named(refused: Refused, workdir: Path) -> None:
    steps = workdir / "checkpoints"
    shutil.copytree(steps / "2", steps / "1")
    (steps / "2" / "meta" / "metadata").unlink()
    error = refused("eval", "--workdir", workdir)
    assert error.endswith("; choose another step of [1], or move it away to train without it")


def test_a_newer_checkpoint_is_refused(refused: Refused, workdir: Path) -> None:
    meta = workdir / "checkpoints" / "2" / "meta" / "metadata"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": 99}))
    assert "has format 99, but this version reads up to 3" in refused("eval", "--workdir", workdir)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.width=64", "is of another size: params/"),
        ("model.universal_layers=2", "is of another size: params/universal/layers/"),
        ("model.vocab_size=50", "config.model.vocab_size=50 is too small for the tokenizer's 160 tokens"),
        ("mesh.fsdp=3", "config.mesh.fsdp=3 needs 3 devices, but there are 8; set one axis to -1"),
        (
            "evaluations.masked_word.num_samples=1",
            "is not a field: did you mean 'masked_words'? (valid: masked_words, ",
        ),
    ],
)
def test_an_override_that_does_not_fit_a_run_is_refused(
    override: str, message: str, refused: Refused, trained: TrainedRun
) -> None:
    assert message in refused("eval", "--workdir", trained.workdir, f"--config.{override}")


def test_an_unknown_evaluation_is_refused_with_the_nearest(refused: Refused, trained: TrainedRun) -> None:
    assert refused("eval", "--workdir", trained.workdir, "--only", "mor_words") == (
        "--only mor_words is not an evaluation of this run: did you mean 'more_words'? "
        "(valid: masked_words, more_words)"
    )


def test_a_refusal_is_one_line_of_the_whole_process_too(workdir: Path, repository: Path) -> None:
    (workdir / "checkpoints" / "2" / "state" / "manifest.ocdbt").write_bytes(b"")
    edit(workdir, lambda config: config["mesh"].update(fsdp=-1))
    words = [sys.executable, "-m", "mplug2_jax.cli.main", "eval", "--workdir", workdir]
    done = subprocess.run(words, cwd=repository, capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu"})
    assert "is damaged (" in error_of(Outcome.split(done.returncode, done.stdout, done.stderr))


# Files to generate from


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.png", None, "does not exist or is not a file; expected an image, a video or a .txt file"),
        ("empty.png", b"", "cannot be read as an image: "),
        ("empty.mp4", b"", "cannot be read as a video: "),
        ("empty.gif", b"", "cannot be read as a video: "),
        ("noise.png", bytes(range(256)) * 9, "cannot be read as an image: "),
        ("noise.mp4", bytes(range(256)) * 9, "cannot be read as a video: "),
        ("noise", b"no picture at all", "cannot be read as a video: "),
        ("cut.png", "a.png", "cannot be read as an image: image file is truncated"),
        ("cut.mp4", "a.mp4", "cannot be read as a video: "),
        ("empty.txt", b" \n", "is empty; expected an instruction, or the text for {text} in --instruction"),
        ("latin.txt", b"caf\xe9", "is not UTF-8 text (unexpected end of data at byte 3)"),
    ],
)
def test_an_unreadable_file_is_refused(
    name: str, content: bytes | str | None, message: str, refused: Refused, pictures: Path, media: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    if isinstance(content, str):
        data = (media / content).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif content is not None:
        path.write_bytes(content)
    error = refused("generate", "--workdir", pictures, path)
    assert error.startswith(f"{path} {message}")
    if "cannot be read" in error:
        assert error.endswith("; replace or remove the file")


def test_a_model_that_cannot_answer_is_refused(refused: Refused, trained: TrainedRun, media: Path) -> None:
    error = refused("generate", "--workdir", trained.workdir, media / "a.png")
    assert error == f"the model in {trained.workdir} has no decoder (its parts: text, universal, mlm)"


@pytest.mark.parametrize("option", ["--num-beams", "--max-length"])
def test_a_search_of_nothing_is_refused(option: str, refused: Refused, pictures: Path, media: Path) -> None:
    assert "must be at least 1" in refused("generate", "--workdir", pictures, media / "a.png", option, 0)


# Tools


@pytest.mark.parametrize("kind", ["wordpiece", "sentencepiece"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{texts} --out {taken}", "--out {taken} exists; remove it, or choose another name"),
        ("{missing} --out {new}", "{missing}: No such file or directory"),
        ("{texts} {taken} --out {new}", "{taken}: Is a directory"),
        ("{latin} --out {new}", "text file {latin} is not UTF-8: unexpected end of data in line 2"),
        ("{empty} --out {new}", "{empty}: found no text, expected lines of words"),
        ("{texts} --out {new} --vocab-size 9", "vocab_size"),
        ("{texts} --out {new} --vocab-size -9", "vocab_size is -9, expected "),
        ("{texts} --out {texts}/new --vocab-size 99", "{texts}/new: Not a directory"),
    ],
)
def test_a_tokeniser_that_cannot_be_trained_is_refused(
    words: str, message: str, kind: str, refused: Refused, tmp_path: Path
) -> None:
    names = {name: tmp_path / name for name in ("texts", "missing", "latin", "empty", "taken", "new")}
    names["texts"].write_text("a small red digit moves\n" * 9)
    names["latin"].write_bytes(b"tea\ncaf\xe9")
    names["empty"].write_text("\n \n")
    names["taken"].mkdir()
    error = refused("data", "tokenizer", "--kind", kind, *words.format(**names).split())
    assert error.startswith(message.format(**names))


def test_samples_never_replace_files(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "image-1.png").write_text("precious")
    words = ("data", "sample", "--kind", "image", "--out")
    assert refused(*words, tmp_path) == f"{tmp_path / 'image-1.png'} exists; choose another --out"
    assert refused(*words, tmp_path / "new", "--count", 0) == "--count 0 should be at least 1"
    inside = tmp_path / "image-1.png" / "new"
    assert refused(*words, inside) == f"{inside}: Not a directory"


GOLDEN = {
    "caption_weights.safetensors": "is truncated or not a safetensors file",
    "caption_outputs.npz": "is damaged or holds more than plain arrays",
    "caption_stats.json": "is not valid JSON",
    "config.json": "is not valid JSON",
    "inputs.npz": "is damaged or holds more than plain arrays",
}


@pytest.mark.parametrize("how", ["deleted", "truncated", "emptied"])
@pytest.mark.parametrize(("name", "message"), GOLDEN.items(), ids=GOLDEN)
def test_a_golden_folder_with_broken_files_is_refused(
    name: str, message: str, how: str, refused: Refused, reference: Path, tmp_path: Path
) -> None:
    for path in (reference / "goldens" / "c1_fc").iterdir():
        if path.name in GOLDEN:
            (tmp_path / path.name).symlink_to(path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if how != "deleted":
        (tmp_path / name).write_bytes(data[: len(data) // 2] if how == "truncated" else b"")
    error = refused("convert", "parity", tmp_path, "--summary")
    assert f"{tmp_path / name} {'does not exist' if how == 'deleted' else message}" in error


def test_parity_of_nothing_and_over_a_file_is_refused(refused: Refused, tmp_path: Path) -> None:
    assert refused("convert", "parity", tmp_path / "missing") == f"golden folder {tmp_path / 'missing'} does not exist"
    (tmp_path / "config.json").write_text("{}")
    assert "holds no model: expected caption_, videoqa_ or plain weights" in refused("convert", "parity", tmp_path)
    rows = tmp_path / "rows.json"
    rows.write_text("[]")
    message = refused("convert", "parity", tmp_path, "--json", rows)
    assert message == f"--json {rows} exists; remove it, or choose another name"
