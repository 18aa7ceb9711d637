"""``mplug2 data show, validate, index, convert, chunk``: output, files and errors."""

import html
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.storage.paths import to_path, upload_folder
from tests.data_pipelines.worlds import encode_media, img2dataset, records, write_tar

from .conftest import mplug2


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    (tmp_path / "tars").mkdir()
    img2dataset(tmp_path / "tars" / "0.tar", 5)
    return tmp_path / "tars"


def recipe(tmp_path: Path, recipes: Path, tar: Path) -> Path:
    """Write the recipe with images from a tar as its stream, with imports as in older recipes."""
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


def test_show_writes_the_batch_of_a_step_and_escapes_texts(tmp_path: Path, recipes: Path) -> None:
    hostile = "<script>alert(1)</script>"
    images = [encode_media(record) for record in records("image", 4)]
    members: dict[str, bytes | str] = {}
    for i, image in enumerate(images):
        members |= {f"{i}.png": b"broken" if i == 3 else image, f"{i}.txt": f"{hostile} {i}"}
    tar = write_tar(tmp_path / "a.tar", members)
    words = ("data", "show", recipe(tmp_path, recipes, tar), "--step", 3, "--out", tmp_path / "sheets")
    done = mplug2(*words)
    assert (done.status, done.err) == (0, "")
    page, sheet = (tmp_path / "sheets" / f"video_text-step3.{suffix}" for suffix in ("html", "png"))
    assert done.out == f"{page}\n{sheet}\n"
    text = page.read_text()
    assert "<script" not in text
    assert sorted(re.findall(r"<p>(.*alert.*)</p>", text)) == sorted(
        f"{html.escape(hostile)} {i}" for i in (0, 0, 1, 2)
    )
    assert "epoch 3" in text
    assert "replaces a/3: a.tar:3.png cannot be read as an image" in text
    assert text.count("data:image/png;base64,") == 4
    assert "http" not in text.replace("http-equiv", "")
    with Image.open(sheet) as image:
        assert image.size == (4 * 100, 100)
    again = mplug2(*words)
    assert (again.status, again.err) == (2, f"mplug2: error: {page} exists; choose another --out\n")


def test_validate_reports_errors_in_its_output_and_status(tmp_path: Path, recipes: Path, tars: Path) -> None:
    good = mplug2("data", "validate", f"webdataset:{tars}")
    assert (good.status, good.err) == (0, "")
    assert "  5 records, 5 encoded images, 0 encoded videos\n" in good.out
    assert good.out.splitlines()[-1] == "OK: all 5 records are usable"
    assert re.search(r"webdataset:\S+  record 5/5  [\d.,]+ records/s  eta 0:00\n", good.log)
    assert re.search(r"10-15  words +\d+ #+\n", good.out)
    bad = write_tar(tmp_path / "bad.tar", {"1.png": b"x", "1.txt": "a", "2.txt": "b"})
    done = mplug2("data", "validate", recipe(tmp_path, recipes, bad))
    assert done.status == 1
    assert "video_text/web\n  2 records, 1 encoded images" in done.out
    assert (
        "  1 unreadable media\n  1 unreadable records\n    bad/1: bad.tar:1.png cannot be read as an image" in done.out
    )
    assert done.out.splitlines()[-1] == "2 of 2 records unusable: 1 unreadable media, 1 unreadable records"


def test_validate_allows_a_bad_fraction_and_reports_as_json(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "caption": "x"}] * 3 + [{"image": "a.png", "caption": "\x1b[31m \ud83d"}]
    (tmp_path / "a.png").write_bytes(encode_media(records("image", 1)[0]))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    checked = ("data", "validate", f"annotations:{tmp_path}/rows.json")
    fractions = (0, 0.2, 0.25, 1)
    assert [mplug2(*checked, "--max-bad-fraction", fraction).status for fraction in fractions] == [1, 1, 0, 0]
    assert mplug2(*checked, "--allow", 0.25, "--size", 4).status == 0  # the old names of the options
    done = mplug2(*checked)
    assert done.out.splitlines()[-1] == "1 of 4 records unusable: 1 unreadable records"
    assert done.out.replace("\n", "").isprintable()
    report = json.loads(mplug2(*checked, "--json").out)
    assert (report["format_version"], report["records"], report["usable"]) == (2, 4, 3)
    assert report["errors"] == {"unreadable records": 1}
    assert report["failed"] == [source["name"] for source in report["sources"]]
    assert [record["key"] for record in report["sources"][0]["bad_records"]] == ["record 3"]
    wrong = mplug2(*checked, "--kind", "video")
    assert "3 media of another kind" in wrong.out
    assert "a.png is an image, expected a video; set the source's kind" in wrong.out
    subset = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": i, "caption": "x"} for i in (1, 2)],
    }
    (tmp_path / "subset.json").write_text(json.dumps(subset))
    done = mplug2("data", "validate", f"coco_captions:{tmp_path}/subset.json")
    assert (done.status, done.err) == (0, "")
    assert "warning: " in done.out
    assert "subset.json: skipped 1 caption entries whose image_id is not listed; the first is '2'" in done.out
    assert done.out.splitlines()[-1] == "OK: all 1 records are usable; warnings above"


def test_validate_reads_a_recipe_with_its_evaluations(tmp_path: Path, recipes: Path) -> None:
    """A record with too few answers to be scored is unusable in an evaluation, and fine for training."""
    (tmp_path / "a.png").write_bytes(encode_media(records("image", 1)[0]))
    annotated = [["yes"] * 10, ["yes", "", "", ""], ["no"] * 3]
    rows = [{"image": "a.png", "question": "is it?", "answers": answers} for answers in annotated]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "recipe.py").write_text(f"""
from data_pipelines.config import DataConfig, ExampleConfig, InstructionConfig, SourceConfig, VisualConfig
from mplug2_jax.config import as_recipe, load_recipe
from mplug2_jax.evaluation.config import EvaluationConfig


def get_config():
    config = load_recipe({str(recipes / "pictures.py")!r})
    asked = {{"question": InstructionConfig(templates=("{{question}}",))}}
    data = DataConfig(
        sources={{"own": SourceConfig(format="annotations", path={str(tmp_path / "rows.json")!r})}}, batch_size=2,
        examples=ExampleConfig(instructions=asked, instruction_length=8, target_length=8),
        visual=VisualConfig(image_size=16),
    )
    config.streams.video_text.data = as_recipe(data)
    config.streams.video_text.objectives = {{"answer": 1.0}}
    config.evaluations = as_recipe({{"held": EvaluationConfig(task="vqa", data=data)}})
    return config
""")
    done = mplug2("data", "validate", tmp_path / "recipe.py")
    assert (done.status, done.err) == (1, "")
    assert "video_text/own\n  3 records" in done.out
    assert (
        "evaluations/held/own\n  3 records, 3 encoded images, 0 encoded videos\n  1 records without required"
        in done.out
    )
    assert "record rows/3 has 3 annotated answers, expected at least 4" in done.out
    assert done.out.splitlines()[-1] == "1 of 6 records unusable: 1 records without required fields"


def test_convert_and_chunk_write_files_that_validate(tmp_path: Path, tars: Path, vocabulary: Path) -> None:
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
    assert f"{shard} has changed: its sha256 differs" in changed.out
    assert changed.out.splitlines()[-1].endswith("1 changed files")

    (tmp_path / "a.txt").write_text("a red four moves left\n" * 20)
    corpus = tmp_path / "c.array_record"
    done = mplug2("data", "chunk", tmp_path / "a.txt", "--tokenizer", vocabulary, "--length", 12, "--out", corpus)
    assert (done.status, done.err) == (0, "")
    assert re.fullmatch(rf"{re.escape(str(corpus))}: \d+ records of 12 tokens\n", done.out)


def test_index_resumes_and_renews(tmp_path: Path, tars: Path) -> None:
    img2dataset(tars / "1.tar", 3, start=5)
    done = mplug2("data", "index", tars)
    merged = tars / "merged.index"
    assert (done.status, done.out) == (0, f"{merged}: 8 samples in 2 tars; 2 scanned, 0 up to date\n")
    assert re.search(r"scanning  0/0 MB  .* eta 0:00", done.log)
    before = merged.stat().st_mtime_ns
    assert mplug2("data", "index", f"webdataset:{tars}").out.endswith("; 0 scanned, 2 up to date\n")
    assert merged.stat().st_mtime_ns == before
    img2dataset(tars / "1.tar", 1)
    merged.write_bytes(b"damaged")
    done = mplug2("data", "index", tars)
    assert done.out.endswith("6 samples in 2 tars; 1 scanned, 1 up to date\n")
    elsewhere = tmp_path / "indexes"
    done = mplug2("data", "index", tars / "0.tar", "--index", elsewhere)
    assert done.out == f"{elsewhere}{tars}/0.tar.index: 5 samples in 1 tar; 1 scanned, 0 up to date\n"
    (tars / "2.tar").write_bytes(b"no tar")
    done = mplug2("data", "index", tars)
    assert (done.status, done.out) == (2, "")
    assert f"{tars}/2.tar cannot be read as a tar" in done.err


def test_data_in_buckets(bucket: str, tmp_path: Path, tars: Path, vocabulary: Path) -> None:
    upload_folder(str(tars), to_path(f"{bucket}/tars"))
    assert mplug2("data", "index", f"{bucket}/tars", "--index", f"{bucket}/indexes").status == 0
    words = ("data", "convert", f"webdataset:{bucket}/tars", "--out", f"{bucket}/records", "--shards", 2)
    done = mplug2(*words)
    assert done.status == 0
    assert done.out.endswith("5 records in 2 shards\n")
    assert mplug2(*words).out == done.out
    validated = mplug2("data", "validate", f"array_record:{bucket}/records")
    assert validated.out.endswith("OK: all 5 records are usable\n")
    (to_path(bucket) / "a.txt").write_text("a red four moves left\n" * 20)
    options = ("--tokenizer", vocabulary, "--length", 12, "--out", f"{bucket}/c.array_record")
    assert mplug2("data", "chunk", f"{bucket}/a.txt", *options).status == 0
    assert mplug2("data", "validate", f"array_record:{bucket}/c.array_record", "--kind", "text").status == 0
    assert mplug2("data", "sample", "--count", 1, "--out", f"{bucket}/samples").status == 0
    assert mplug2("data", "sample", "--count", 1, "--kind", "video", "--out", f"{bucket}/samples").status == 0
    for kind, count in (("image", 1), ("video", 1)):
        done = mplug2("data", "validate", f"files:{bucket}/samples", "--kind", kind)
        assert done.out.endswith(f"OK: all {count} records are usable\n")
    done = mplug2("data", "tokenizer", f"{bucket}/a.txt", "--vocab-size", 60, "--out", f"{bucket}/tok")
    assert (done.status, done.out.startswith(f"{bucket}/tok/vocab.txt: ")) == (0, True)
    done = mplug2("data", "show", "demo", "--stream", "video_text", "--out", f"{bucket}/sheets")
    assert done.status == 0
    assert to_path(f"{bucket}/sheets/video_text-step1.png").is_file()
    assert not Path("gs:").exists()


REFUSED = {
    "format": (["validate", "webdatset:x"], "'webdatset:x' is not FORMAT:PATH with a known format: did you mean 'we"),
    "recipe": (["validate", "demmo"], "recipe 'demmo' is neither a file nor a shipped recipe: did you mean 'demo'?"),
    "missing": (["validate", "webdataset:{tmp}/x.tar"], "{tmp}/x.tar does not exist; check the path"),
    "empty": (["validate", "array_record:{tmp}"], "{tmp} holds no file that ends in .array_record; found 0 other"),
    "tfds": (["validate", "tfds:{tmp}"], "{tmp} is not a TFDS data set (Could not"),
    "unread": (["validate", "webdataset:x", "--split", "val"], "source.split='val' is not read by format 'webd"),
    "out": (["validate", "digitworld:", "--out", "{tmp}/out"], "--worker and --out need each other: workers write"),
    "worker": (["validate", "digitworld:", "--worker", "1/1", "--out", "{tmp}/out"], "--worker 1/1: expected INDEX/CO"),
    "json": (["validate", "digitworld:", "--worker", "0/1", "--out", "{tmp}/out", "--json"],
             "--json with --worker 0/1: give it to data summary"),
    "summary": (["summary", "{tmp}"], "{tmp} has no job.json: expected the --out folder of data convert, chunk or va"),
    "one file": (["chunk", "a.txt", "--tokenizer", "{vocabulary}", "--out", "{tmp}/a.array_record", "--shards", "2"],
                 "--shards 2 with --out {tmp}/a.array_record: shards are written into a folder; give its name"),
    "override": (["validate", "webdataset:x", "--config.steps=3"], "--config.steps=3 is for recipes, and "),
    "stream": (["show", "demo", "--stream", "txt"], "--stream txt is not in the recipe: did you mean 'text'?"),
    "step": (["show", "demo", "--step", "0"], "--step 0 should be at least 1, the first step"),
    "fraction": (["validate", "webdataset:x", "--max-bad-fraction", "2"], "--max-bad-fraction=2.0 must be between 0"),
    "index": (["index", "{tmp}/x.tar"], "{tmp}/x.tar does not exist; check the path"),
    "scheme": (["index", "{tmp}", "--index", "ftp://x/y"], "ftp://x/y: expected a path on this machine, gs://BUCKET"),
    "threads": (["index", "{tmp}", "--workers", "0"], "--num-threads 0 should be at least 1"),
    "workers": (["convert", "digitworld:", "--out", "{tmp}", "--workers", "0"], "--num-threads 0 should be at least 1"),
    "shards": (["convert", "digitworld:", "--out", "{tmp}", "--max-records", "2", "--shards", "3"],
               "cannot write 3 shards of 2 records"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED)
def test_errors_are_one_sentence(words: list[str], message: str, tmp_path: Path, vocabulary: Path) -> None:
    done = mplug2("data", *(word.format(tmp=tmp_path, vocabulary=vocabulary) for word in words))
    assert done.status == 2
    assert done.err.startswith(f"mplug2: error: {message.format(tmp=tmp_path)}")
    assert list(tmp_path.iterdir()) == []
