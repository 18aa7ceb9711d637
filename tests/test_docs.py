"""The commands of docs/ work, in order, on files in the formats that they name."""

import dataclasses
import itertools
import json
import re
import shlex
import socket
import string
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.config import SourceConfig
from data_pipelines.digitworld import vocabulary_texts
from data_pipelines.tokenizers import train_wordpiece
from mplug2_jax.config import build, load_recipe
from mplug2_jax.evaluation.config import EvaluationConfig
from mplug2_jax.model.config import model_config
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.telemetry.events import read_events
from tests.cli.conftest import mplug2
from tests.data_pipelines.worlds import encode_media, img2dataset, records
from tests.processes import run_commands
from tests.runs import ONE_LAYER, recipe_file, text_run
from tests.weights import official_file


def commands(page: str) -> list[list[str]]:
    """Return the arguments of every command of a page: lines of ```bash blocks, and lines after $ in other blocks."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    lines = [
        line for kind, block in blocks for line in block.splitlines() if kind == "bash" or line.startswith("$ ")
    ]  # fmt: skip
    return [shlex.split(line.removeprefix("$ "), comments=True)[1:] for line in lines if line]


def run(args: Sequence[str], status: int = 0) -> str:
    outcome = mplug2(*args)
    assert outcome.status == status, f"mplug2 {shlex.join(args)}\n{outcome.out}\n{outcome.err}"
    return outcome.out


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the test in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_file(name: str, content: Any) -> None:
    """Write bytes or text as they are, a tuple of dicts as JSON lines, and anything else as JSON."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, tuple):
        content = "".join(json.dumps(row) + "\n" for row in content)
    elif not isinstance(content, bytes | str):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def world(here: Path) -> Path:
    """Write the public data sets that docs/data.md names, with a record or two each."""
    image, video = encode_media(records("image", 1)[0]), encode_media(records("video", 1)[0])
    for name in ("coco/val2014/a.jpg", "imagenet/val/n01/a.JPEG"):
        write_file(name, image)
    for name in ("msrvtt/videos/video1.mp4", "k400/val/abc_000003_000013.mp4", "ssv2/videos/78.webm"):
        write_file(name, video)
    questions = tuple({"video_id": f"video{i}", "question": "what?", "answer": "a digit"} for i in (1, 99))
    write_file("msrvtt/train_qa.jsonl", questions)
    write_file("coco/captions_val2014.json", {
        "images": [{"id": 42, "file_name": "a.jpg"}], "annotations": [{"image_id": 42, "id": 1, "caption": "one"}]
    })  # fmt: skip
    write_file("coco/v2_OpenEnded_mscoco_val2014_questions.json", {
        "data_subtype": "val2014", "questions": [{"image_id": 9, "question": "what?", "question_id": 1}]
    })  # fmt: skip
    write_file("coco/v2_mscoco_val2014_annotations.json", {
        "annotations": [{"question_id": 1, "answers": [{"answer": "two"}] * 10}]
    })  # fmt: skip
    write_file("coco/val2014/COCO_val2014_000000000009.jpg", image)
    write_file("dataset_coco.json", {"dataset": "coco", "images": [
        {"filepath": "val2014", "filename": "a.jpg", "imgid": 0, "split": "test", "sentences": [{"raw": "A cat."}]}
    ]})  # fmt: skip
    write_file("k400/val.csv", "label,youtube_id,time_start,time_end,split\nwaving,abc,3,13,val\n")
    write_file("ssv2/validation.json", [{"id": "78", "label": "holding a pen", "template": "Holding [something]"}])
    write_file("glue/RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n")
    write_file("wiki.txt", "a red four moves left\n" * 60)
    (here / "shards").mkdir()
    img2dataset(here / "shards" / "00000.tar")
    train_wordpiece(vocabulary_texts(60), 160).save(here / "tok")
    return here


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs(repository: Path, here: Path) -> None:
    """Use a smaller recipe than the page's."""
    heldout = {"digits": SourceConfig(kind="text", split="heldout", max_records=8)}
    data = dataclasses.replace(text_run().streams["text"].data, sources=heldout)
    evaluations = {"words": EvaluationConfig(task="mlm", data=data, num_samples=2)}
    run = text_run(evaluations=evaluations, mesh=MeshConfig(fsdp=-1))
    recipe = str(recipe_file(run, here / "recipe.py"))
    pages = [(repository / "docs" / name).read_text() for name in ("runs.md", "operations.md")]
    lines = itertools.chain.from_iterable(map(commands, pages))
    words = [[{"demo": recipe, "120": "3"}.get(arg, arg) for arg in args] for args in lines]
    printed = run_commands(words, here, JAX_NUM_CPU_DEVICES="4")
    assert printed.count("bit for bit") == sum(args[0] == "replay" for args in words)
    events = read_events(here / "runs" / "two" / "events.jsonl")
    fields = [line["field"] for line in events if line["event"] == "config_changed"]
    assert fields == ["optimizer.learning_rate", "streams.text.data.num_threads"]
    assert "optimizer.learning_rate" in (here / "runs" / "two" / "report.html").read_text()


@pytest.mark.timeout(300)
def test_tasks(repository: Path, here: Path) -> None:
    page = (repository / "docs" / "tasks.md").read_text()
    for args in commands(page):
        run(args)
    example = re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert example
    write_file("ours.py", example[1])
    config = build(RunConfig, load_recipe("ours.py:tiny"))
    assert config.streams["set"].data.sources["set"].path == "data/ours/train.json"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_plans(repository: Path, here: Path) -> None:
    """Search for 0 minutes, in which only the recipe's own layout is tried. Use one layer per module."""
    words = commands((repository / "docs" / "plans.md").read_text())
    for args in words:
        if "--minutes" in args:
            args[args.index("--minutes") + 1] = "0"
        args += ONE_LAYER if args[0] == "plan" else []
    run_commands(words, here, HOME=str(here))
    assert (here / "plan.html").exists()
    assert (here / "runs" / "planned" / "report.html").exists()


@pytest.mark.timeout(600)
def test_data(repository: Path, world: Path) -> None:
    pages = commands((repository / "docs" / "data.md").read_text())
    assert len(pages) >= 13
    for args in pages:
        if any(arg.startswith("tfds:") for arg in args):
            from tests.data_pipelines.sources import tfds_builders

            tfds_builders.Digits(data_dir=world / "tfds", file_format="array_record").download_and_prepare()
        broken = "annotations:msrvtt/train_qa.jsonl" in args  # the page shows the report of a missing video
        if args[:2] == ["launch", "local"]:  # it forwards what its processes write
            command = [sys.executable, "-m", "mplug2_jax.cli.main", *args]
            printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
        else:
            printed = run(args, status=1 if broken else 0)
        reports = "validate" in args or args[1] == "summary"
        assert bool(re.search(r"^(OK: all|\d+ of) \d+ records", printed, re.MULTILINE)) == reports
    assert (world / "sheets" / "video_text-step7.png").exists()


@pytest.fixture
def ours(here: Path) -> Path:
    """Write the folder of docs/own-data.md."""
    rows = ["file_name,caption"]
    names = {"image": "ours/pictures/{}.png", "video": "ours/clips/{}.mp4"}
    for kind, name in names.items():
        for letter, record in zip(string.ascii_lowercase[:20], records(kind, 20), strict=True):
            write_file(name.format(letter), encode_media(record))
            rows.append(f'{name.format(letter).removeprefix("ours/")},"{record.captions[0]}"')
    write_file("ours/captions.csv", "\n".join(rows))
    for name in "ab":
        write_file(f"ours/texts/{name}.txt", "a red four moves left quickly\n" * 3)
    return here


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_own_data(repository: Path, ours: Path) -> None:
    """Train two steps, with one layer per module."""
    page = (repository / "docs" / "own-data.md").read_text()
    recipe = re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert recipe
    write_file("ours.py", recipe[1])
    few = ["--config.steps=2", *ONE_LAYER]
    printed = run_commands([[*args, *(few if args[0] == "train" else [])] for args in commands(page)], ours)
    outputs = dict(re.findall(r"^\$ (.*)\n([^$]*)", printed, flags=re.MULTILINE))
    assert "OK: all 80 records are usable" in outputs["mplug2 data validate folder:ours"]
    assert "OK: all 74 records are usable" in outputs["mplug2 data validate ours.py:tiny"]
    for name in ("image_retrieval", "video_retrieval", "image_captions", "video_captions"):
        num_heldout = {"image": 9, "video": 8}[name.partition("_")[0]]
        assert json.loads(Path(f"runs/ours/evaluations/2/{name}.json").read_text())["num_examples"] == num_heldout
    assert Path("runs/ours/report.html").is_file()
    assert re.search(
        r"PyTorch: 0 of \d+ taps differ", outputs["mplug2 convert export runs/ours --to exports/ours --verify"]
    )
    assert Path("exports/ours/model.safetensors").is_file()


@pytest.fixture
def official(here: Path) -> Path:
    """Write the files of docs/weights.md: a released question-answering and a caption model, and their vocabulary."""
    pytest.importorskip("torch", reason="PyTorch is not installed here")
    vocabulary = train_wordpiece(vocabulary_texts(60), 160).save(here / "tok")
    write_file("vocab.txt", vocabulary.read_bytes())
    size = model_config("tiny", vocab_size=160, vision_layers=1, decoder_layers=1)
    official_file(here / "mplug2_msrvtt_qa.pth", size, teacher=True)
    official_file(here / "captions" / "c.safetensors", size, task="caption")
    return here


def shrink(args: list[str]) -> list[str]:
    """Return the same command on the smallest sizes."""
    args = [arg.replace("released:videoqa", "released:videoqa,tiny") for arg in args]
    if args[0] == "train":
        args += ["--config.steps=1", "--config.model.vocab_size=160", "--config.evaluations.video.data.batch_size=8"]
        args += ["--config.evaluations.video.data.sources.clips.max_records=8"]
    if args[0] == "eval":
        args += ["--config.evaluations.video.data.sources.clips.max_records=8"]
    return args


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_weights(repository: Path, official: Path) -> None:
    words = map(shrink, commands((repository / "docs" / "weights.md").read_text()))
    run_commands([[arg.replace("/checkpoints/2000", "/checkpoints/1") for arg in args] for args in words], official)
    assert Path("runs/tuned/tokenizer/vocab.txt").read_bytes() == Path("vocab.txt").read_bytes()
    assert {path.name for path in (official / "exports" / "qa").iterdir()} >= {"README.md", "model.safetensors"}


@pytest.fixture
def captions(official: Path) -> Path:
    """Return a folder with an exported caption model."""
    run(["convert", "import", "captions/c.safetensors", "--to", "ours", "--tokenizer", "vocab.txt"])
    run(["convert", "export", "ours", "--to", "exports/caption"])
    return official


def programs(page: str) -> tuple[str, str, str]:
    """Return the three programs of docs/weights.md for PyTorch; tests/conversion/engines runs the others."""
    wrap, read, serve, *_ = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    return wrap, read, serve


@pytest.fixture
def server(repository: Path, captions: Path) -> Iterator[str]:
    """Run the page's server in a process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = programs((repository / "docs" / "weights.md").read_text())[2].replace("8000", str(port))
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=captions, env={"PYTHONPATH": str(repository)}, stderr=subprocess.PIPE
    )
    yield f"http://localhost:{port}"
    process.kill()
    process.communicate()


def post(server: str, data: bytes) -> str:
    """Return the server's answer, once it is up."""
    for _ in range(300):
        try:
            with urllib.request.urlopen(server, data) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            return f"{error.code} {error.reason}"
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server did not come up")


@pytest.mark.timeout(300)
def test_programs_for_pytorch(repository: Path, captions: Path, server: str) -> None:
    torch = pytest.importorskip("torch")
    wrap, read, _ = programs((repository / "docs" / "weights.md").read_text())
    run(["convert", "export", "ours", "--to", "half/qa.pth"])
    exec(wrap, {"torch": torch})
    assert set(torch.load("for_the_release.pth", weights_only=True)) == {"model"}
    exec(read, {})
    clip = encode_media(records("video", 1)[0])
    assert len(post(server, clip).split()) >= 1
    assert post(server, clip) == post(server, clip)
    assert post(server, b"no clip").startswith("400 the request cannot be read as a video")
