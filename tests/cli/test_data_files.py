"""``mplug2 data show, validate, convert, chunk``: what they print, write and refuse."""

import html
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.data_pipelines.worlds import encoded, img2dataset, records, write_tar

from .conftest import Outcome

Mplug2 = Callable[..., Outcome]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    (tmp_path / "tars").mkdir()
    img2dataset(tmp_path / "tars" / "0.tar", 5)
    return tmp_path / "tars"


def recipe(tmp_path: Path, recipes: Path, tar: Path) -> Path:
    """The text recipe of the package with pictures from a tar as its stream; with imports of older recipes."""
    path = tmp_path / "recipe.py"
    path.write_text(
        f"""
from data_pipelines.examples import ExampleConfig, InstructionConfig
from data_pipelines.loader import DataConfig
from data_pipelines.sources.config import SourceConfig
from data_pipelines.visual import VisualConfig
from mplug2_jax.config import as_recipe, load_recipe


def get_config():
    config = load_recipe({str(recipes / "pictures.py")!r})
    source = SourceConfig(format="webdataset", path={str(tar)!r})
    data = DataConfig(
        sources={{"web": source}}, visual=VisualConfig(image_size=16), examples=ExampleConfig(text_length=12),
        batch_size=4,
    )
    config.streams.video_text.data = as_recipe(data)
    config.streams.video_text.objectives = {{"vlc": 1.0}}
    return config
"""
    )
    return path


def test_show_writes_what_a_step_sees_and_escapes_it(mplug2: Mplug2, tmp_path: Path, recipes: Path) -> None:
    hostile = "<script>alert(1)</script>"
    pictures = [encoded(record) for record in records("image", 4)]
    members: dict[str, bytes | str] = {}
    for i, picture in enumerate(pictures):
        members |= {f"{i}.png": b"broken" if i == 3 else picture, f"{i}.txt": f"{hostile} {i}"}
    tar = write_tar(tmp_path / "a.tar", members)
    shown = ("data", "show", recipe(tmp_path, recipes, tar), "--step", 3, "--out", tmp_path / "sheets")
    done = mplug2(*shown)
    assert (done.status, done.err) == (0, "")
    page, sheet = (tmp_path / "sheets" / f"video_text-step3.{suffix}" for suffix in ("html", "png"))
    assert done.out == f"{page}\n{sheet}\n"
    text = page.read_text()
    assert "<script" not in text
    assert sorted(re.findall(r"<p>(.*alert.*)</p>", text)) == sorted(
        f"{html.escape(hostile)} {i}" for i in (0, 0, 1, 2)
    )
    assert "epoch 3" in text
    assert "in place of a/3: a.tar:3.png cannot be read as an image" in text
    assert text.count("data:image/png;base64,") == 4
    assert "http" not in text.replace("http-equiv", "")
    with Image.open(sheet) as picture:
        assert picture.size == (4 * 100, 100)
    again = mplug2(*shown)
    assert (again.status, again.err) == (2, f"mplug2: error: {page} exists; choose another --out\n")


def test_validate_reports_and_its_status_tells(mplug2: Mplug2, tmp_path: Path, recipes: Path, tars: Path) -> None:
    good = mplug2("data", "validate", f"webdataset:{tars}")
    assert (good.status, good.err) == (0, "")
    assert "  5 records, 5 encoded pictures, 0 encoded clips\n" in good.out
    assert "nothing would be lost" in good.out
    assert re.search(r"10-15  words +\d+ #+\n", good.out)
    bad = write_tar(tmp_path / "bad.tar", {"1.png": b"x", "1.txt": "a", "2.txt": "b"})
    done = mplug2("data", "validate", recipe(tmp_path, recipes, bad))
    assert done.status == 1
    assert "video_text/web\n  2 records, 1 encoded pictures" in done.out
    assert "1 unreadable media\n    bad/1: bad.tar:1.png cannot be read as an image" in done.out


def test_convert_chunk_and_validate_what_was_written(
    mplug2: Mplug2, tmp_path: Path, tars: Path, vocabulary: Path
) -> None:
    out = tmp_path / "records"
    words = ("data", "convert", f"webdataset:{tars}", "--out", out, "--shards", 2)
    done = mplug2(*words)
    assert (done.status, done.err) == (0, "")
    assert done.out.endswith("5 records in 2 shards\n")
    assert mplug2(*words).out == done.out
    assert mplug2("data", "validate", f"array_record:{out}").status == 0
    shard = out / "data-00001-of-00002.array_record"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    changed = mplug2("data", "validate", f"array_record:{out}")
    assert changed.status == 1
    assert f"{shard} is not what was written: its sha256 differs" in changed.out

    (tmp_path / "a.txt").write_text("a red four moves left\n" * 20)
    corpus = tmp_path / "c.array_record"
    done = mplug2("data", "chunk", tmp_path / "a.txt", "--tokenizer", vocabulary, "--length", 12, "--out", corpus)
    assert (done.status, done.err) == (0, "")
    assert re.fullmatch(rf"{re.escape(str(corpus))}: \d+ records of 12 tokens\n", done.out)


REFUSED = {
    "format": (["validate", "webdatset:x"], "'webdatset:x' is no FORMAT:PATH with a known format: did you mean 'we"),
    "recipe": (["validate", "demmo"], "recipe 'demmo' is neither a file nor a shipped recipe: did you mean 'demo'?"),
    "missing": (["validate", "webdataset:{tmp}/x.tar"], "{tmp}/x.tar does not exist; check the path"),
    "empty": (["validate", "array_record:{tmp}"], "{tmp} holds no file that ends in .array_record; found 0 others"),
    "tfds": (["validate", "tfds:{tmp}"], "{tmp} holds no data set of TFDS (Could not"),
    "unread": (["validate", "webdataset:x", "--split", "val"], "source.split='val' means nothing to format 'webd"),
    "override": (["validate", "webdataset:x", "--config.steps=3"], "--config.steps=3 is for recipes, and "),
    "stream": (["show", "demo", "--stream", "txt"], "--stream txt is none of the recipe's: did you mean 'text'?"),
    "step": (["show", "demo", "--step", "0"], "--step 0 should be at least 1, the first step"),
    "workers": (["convert", "digitworld:", "--out", "{tmp}", "--workers", "0"], "--workers 0 should be at least 1"),
    "shards": (["convert", "digitworld:", "--out", "{tmp}", "--size", "2", "--shards", "3"], "3 shards of 2 records"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_one_sentence(words: list[str], said: str, mplug2: Mplug2, tmp_path: Path) -> None:
    done = mplug2("data", *(word.format(tmp=tmp_path) for word in words))
    assert done.status == 2
    assert done.err.startswith(f"mplug2: error: {said.format(tmp=tmp_path)}")
    assert list(tmp_path.iterdir()) == []
