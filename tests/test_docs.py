"""The commands of docs/ work, in their order, on files of the formats that they name."""

import dataclasses
import json
import os
import re
import shlex
import socket
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
from tests.cli.conftest import command
from tests.data_pipelines.worlds import encoded, img2dataset, records
from tests.runs import recipe_file, small_run
from tests.weights import official_file


def commands(page: str) -> list[list[str]]:
    """The words of every command of a page: lines of ```bash blocks, and those after a $ in the others."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    lines = [
        line for kind, block in blocks for line in block.splitlines() if kind == "bash" or line.startswith("$ ")
    ]  # fmt: skip
    return [shlex.split(line.removeprefix("$ "), comments=True)[1:] for line in lines if line]


def run(words: Sequence[str], status: int = 0) -> str:
    done = command(*words)
    assert done.status == status, f"mplug2 {shlex.join(words)}\n{done.out}\n{done.err}"
    return done.out


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and the process in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(name: str, content: Any) -> None:
    """A file: bytes or text as they are, several dicts as JSON lines, all else as JSON."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, tuple):
        content = "".join(json.dumps(row) + "\n" for row in content)
    elif not isinstance(content, bytes | str):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture
def world(here: Path) -> Path:
    """The public data sets that docs/data.md names, with a record or two each."""
    picture, clip = encoded(records("image", 1)[0]), encoded(records("video", 1)[0])
    for name in ("coco/val2014/a.jpg", "imagenet/val/n01/a.JPEG"):
        put(name, picture)
    for name in ("msrvtt/videos/video1.mp4", "k400/val/abc_000003_000013.mp4", "ssv2/videos/78.webm"):
        put(name, clip)
    asked = tuple({"video_id": f"video{i}", "question": "what?", "answer": "a digit"} for i in (1, 99))
    put("msrvtt/train_qa.jsonl", asked)
    put("coco/captions_val2014.json", {
        "images": [{"id": 42, "file_name": "a.jpg"}], "annotations": [{"image_id": 42, "id": 1, "caption": "one"}]
    })  # fmt: skip
    put("coco/v2_OpenEnded_mscoco_val2014_questions.json", {
        "data_subtype": "val2014", "questions": [{"image_id": 9, "question": "what?", "question_id": 1}]
    })  # fmt: skip
    put("coco/v2_mscoco_val2014_annotations.json", {
        "annotations": [{"question_id": 1, "answers": [{"answer": "two"}] * 10}]
    })  # fmt: skip
    put("coco/val2014/COCO_val2014_000000000009.jpg", picture)
    put("dataset_coco.json", {"dataset": "coco", "images": [
        {"filepath": "val2014", "filename": "a.jpg", "imgid": 0, "split": "test", "sentences": [{"raw": "A cat."}]}
    ]})  # fmt: skip
    put("k400/val.csv", "label,youtube_id,time_start,time_end,split\nwaving,abc,3,13,val\n")
    put("ssv2/validation.json", [{"id": "78", "label": "holding a pen", "template": "Holding [something]"}])
    put("glue/RTE/dev.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n")
    put("wiki.txt", "a red four moves left\n" * 60)
    (here / "shards").mkdir()
    img2dataset(here / "shards" / "00000.tar")
    train_wordpiece(vocabulary_texts(60), 160).save(here / "tok")
    return here


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs(repository: Path, here: Path) -> None:
    """On a smaller recipe than the page's."""
    text = dataclasses.replace(small_run().streams["text"], objectives={"mlm": 1.0})
    heldout = dataclasses.replace(
        text.data, sources={"digits": SourceConfig(kind="text", split="heldout", max_records=8)}
    )
    run = small_run(
        streams={"text": text}, evaluations={"words": EvaluationConfig(task="mlm", data=heldout, num_samples=2)},
        mesh=MeshConfig(fsdp=-1),
    )  # fmt: skip
    recipe = str(recipe_file(run, here / "recipe.py"))
    for words in commands((repository / "docs" / "runs.md").read_text()):
        words = [{"demo": recipe, "120": "3"}.get(word, word) for word in words]
        done = subprocess.run(
            [sys.executable, "-m", "mplug2_jax.cli.main", *words], capture_output=True, text=True, timeout=300,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, f"mplug2 {shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    assert "bit for bit" in done.stdout
    assert (here / "runs" / "two" / "report.html").exists()


@pytest.mark.timeout(300)
def test_tasks(repository: Path, here: Path) -> None:
    page = (repository / "docs" / "tasks.md").read_text()
    for words in commands(page):
        run(words)
    example = re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert example
    put("ours.py", example[1])
    config = build(RunConfig, load_recipe("ours.py:tiny"))
    assert config.streams["set"].data.sources["set"].path == "data/ours/train.json"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_plans(repository: Path, here: Path) -> None:
    """With no time to search: the recipe's own layout is tried even then."""
    for words in commands((repository / "docs" / "plans.md").read_text()):
        if "--minutes" in words:
            words[words.index("--minutes") + 1] = "0"
        done = subprocess.run(
            [sys.executable, "-m", "mplug2_jax.cli.main", *words], capture_output=True, text=True, timeout=600,
            env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"HOME": str(here)},
        )  # fmt: skip
        assert done.returncode == 0, f"mplug2 {shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    assert (here / "plan.html").exists()
    assert (here / "runs" / "planned" / "report.html").exists()


@pytest.mark.timeout(600)
def test_data(repository: Path, world: Path) -> None:
    pages = commands((repository / "docs" / "data.md").read_text())
    assert len(pages) >= 13
    for words in pages:
        if any(word.startswith("tfds:") for word in words):
            from tests.data_pipelines.sources import tfds_builders

            tfds_builders.Digits(data_dir=world / "tfds", file_format="array_record").download_and_prepare()
        broken = "annotations:msrvtt/train_qa.jsonl" in words  # the page shows what is said of a missing clip
        printed = run(words, status=1 if broken else 0)
        assert ("would be lost" in printed) == (words[1] == "validate")
    assert (world / "sheets" / "video_text-step7.png").exists()


@pytest.fixture
def ours(here: Path) -> Path:
    """The folder of docs/own-data.md."""
    pictures, clips = records("image", 16), records("video", 12)
    rows = [f'{i}.png,"{record.captions[0]}"' for i, record in enumerate(pictures)]
    put("ours/captions.csv", "\n".join(["image,caption", *rows]))
    for i, record in enumerate(pictures):
        put(f"ours/pictures/{i}.png", encoded(record))
    told = []
    for name, record in zip("abcdefghijkl", clips, strict=True):
        put(f"ours/clips/{name}.mp4", encoded(record))
        asked = record.questions[0]
        told.append({
            "video": f"{name}.mp4", "caption": record.captions[0], "question": asked.question, "answer": asked.answer
        })  # fmt: skip
    put("ours/clips.jsonl", tuple(told[:8]))
    put("ours/heldout.jsonl", tuple(told[8:]))
    for name in "abcdefghijklmnop":
        put(f"ours/texts/{name}.txt", "a red four moves left quickly\n" * 3)
    return here


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_own_data(repository: Path, ours: Path) -> None:
    """With one layer of each kind."""
    page = (repository / "docs" / "own-data.md").read_text()
    recipe = re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert recipe
    put("ours.py", recipe[1])
    thin = [f"--config.model.{part}_layers=1" for part in ("vision", "text", "universal", "fusion", "decoder")]
    printed = {}
    for words in commands(page):
        printed[" ".join(words[:2])] = run([*words, *thin] if words[0] == "train" else words)
    assert "44 of 44 records are usable" in printed["data validate"]
    assert json.loads(Path("runs/ours/evaluations/2/captions.json").read_text())["examples"] == 4
    assert "0 differ" in printed["convert export"]
    assert Path("exports/ours/model.safetensors").is_file()


@pytest.fixture
def official(here: Path) -> Path:
    """The files that docs/weights.md begins with: a release of questions and its vocabulary; exported captions."""
    pytest.importorskip("torch", reason="PyTorch is not installed here")
    vocabulary = train_wordpiece(vocabulary_texts(60), 160).save(here / "tok")
    put("vocab.txt", vocabulary.read_bytes())
    size = model_config("tiny", vocab_size=160)
    official_file(here / "mplug2_msrvtt_qa.pth", size, teacher=True)
    official_file(here / "captions" / "c.safetensors", size, task="caption")
    return here


def quickly(words: list[str]) -> list[str]:
    """The same command on the smallest sizes: the page's are those of a month."""
    words = [word.replace("released:videoqa", "released:videoqa,tiny") for word in words]
    if words[0] == "train":
        words += ["--config.steps=1", "--config.model.vocab_size=160", "--config.evaluations.video.data.batch_size=8"]
        words += ["--config.evaluations.video.data.sources.clips.max_records=8"]
    if words[0] == "eval":
        words += ["--config.evaluations.video.data.sources.clips.max_records=8"]
    return words


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_weights(repository: Path, official: Path) -> None:
    page = (repository / "docs" / "weights.md").read_text()
    for words in commands(page):
        run([word.replace("/checkpoints/2000", "/checkpoints/1") for word in quickly(words)])
    assert Path("runs/tuned/tokenizer/vocab.txt").read_bytes() == Path("vocab.txt").read_bytes()
    assert {path.name for path in (official / "exports" / "qa").iterdir()} >= {"README.md", "model.safetensors"}


@pytest.fixture
def captions(official: Path) -> Path:
    """A folder with exported captions."""
    run(["convert", "import", "captions/c.safetensors", "--to", "ours", "--tokenizer", "vocab.txt"])
    run(["convert", "export", "ours", "--to", "exports/caption"])
    return official


def programs(page: str) -> tuple[str, str, str]:
    """The three programs of docs/weights.md."""
    wrap, read, serve = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    return wrap, read, serve


@pytest.fixture
def server(repository: Path, captions: Path) -> Iterator[str]:
    """The page's server in a process of its own."""
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


def asked(server: str, data: bytes) -> str:
    """What the server answers, once it is up."""
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
    clip = encoded(records("video", 1)[0])
    assert len(asked(server, clip).split()) >= 1
    assert asked(server, clip) == asked(server, clip)
    assert asked(server, b"no clip").startswith("400 what was sent cannot be read as a video")
