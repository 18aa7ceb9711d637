"""The public corpora of pretraining: a small version of each in its real format, trained on, listed, and missing."""

import json
from pathlib import Path

import jax
import pytest

from data_pipelines.digitworld import vocabulary_texts
from data_pipelines.tokenizers import train_wordpiece
from mplug2_jax.cli.main import main
from mplug2_jax.config import build, load_recipe
from mplug2_jax.recipes.corpora import CORPORA
from mplug2_jax.training.config import RunConfig
from tests.cli.conftest import mplug2
from tests.data_pipelines.worlds import encode_media, img2dataset, records, write_tar

SIZES = ("tiny", "base", "large")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty data folder."""
    monkeypatch.setenv("MPLUG2_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def write_corpora(folder: Path) -> None:
    """Write every corpus as its fetch commands do: COCO, Visual Genome, img2dataset, video2dataset, and chunks."""
    for name in ("coco/train2014", "vg/VG_100K", "sbu", "cc3m", "cc12m", "webvid2m", "bert-base-uncased"):
        (folder / name).mkdir(parents=True)
    train_wordpiece(vocabulary_texts(200), 512).save(folder / "bert-base-uncased")
    pictures = records("image", 12)
    for i, record in enumerate(pictures):
        for place in ("coco/train2014", "vg/VG_100K"):
            (folder / place / f"{i}.jpg").write_bytes(encode_media(record))
    images = [
        {
            "filepath": "train2014", "filename": f"{i}.jpg", "imgid": i, "split": ("train", "restval")[i % 2],
            "sentences": [{"raw": text} for text in record.captions],
        }
        for i, record in enumerate(pictures)
    ]  # fmt: skip
    (folder / "coco" / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))
    rows = [{"image": f"VG_100K/{i}.jpg", "caption": text} for i, r in enumerate(pictures) for text in r.captions]
    (folder / "vg" / "vg_caption.json").write_text(json.dumps(rows))
    for name in ("sbu", "cc3m", "cc12m"):
        img2dataset(folder / name / "00000.tar", 12)
    members: dict[str, bytes | str] = {}
    for i, record in enumerate(records("video", 8)):
        members[f"0000000{i}.mp4"] = encode_media(record)
        members[f"0000000{i}.txt"] = record.captions[0]
        members[f"0000000{i}.json"] = json.dumps({"caption": record.captions[0], "key": f"0000000{i}", "status": "ok"})
    write_tar(folder / "webvid2m" / "00000.tar", members)
    (folder / "text.txt").write_text("a red four moves left quickly\n" * 400)
    vocabulary = str(folder / "bert-base-uncased" / "vocab.txt")
    words = ["data", "chunk", str(folder / "text.txt"), "--tokenizer", vocabulary, "--shards", "2"]
    for name in ("wikipedia", "web"):  # the tiny model has 64 positions
        assert main([*words, "--length", "64", "--out", str(folder / name)]) == 0


@pytest.mark.slow
def test_the_paper_s_recipe_trains_on_all_corpora(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpora(here)
    rows = mplug2("corpora").out.splitlines()[2 : 2 + len(CORPORA)]
    assert [row.split()[-1] for row in rows] == ["yes"] * 8
    single = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: single)
    fields = ["steps=2", "log_every=1", "log_example_ids=True", "streams.video_text.data.visual.num_frames=2"]
    fields += [f"model.{part}_layers=1" for part in ("vision", "text", "fusion", "decoder", "universal")]
    run = tmp_path / "run"
    words = [f"--config.{field}" for field in fields]
    assert main(["train", "--config", "pretrain:tiny,paper", "--workdir", str(run), *words]) == 0
    assert not (run / "data-errors.jsonl").exists()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["loss"] < 1e3 for line in metrics if "loss" in line)


def test_sources_have_the_weights_of_the_paper_s_table(here: Path) -> None:
    config = build(RunConfig, load_recipe("pretrain:large,paper"))
    sources = {name: stream.data.sources for name, stream in config.streams.items()}
    assert {name: set(each) for name, each in sources.items()} == {
        "image_text": {"coco", "vg", "sbu", "cc3m", "cc12m"}, "video_text": {"webvid2m"}, "text": {"wikipedia", "web"},
    }  # fmt: skip
    weights = {name: source.weight for each in sources.values() for name, source in each.items()}
    assert sum(weights[name] for name in sources["image_text"]) == pytest.approx(15.196)  # million texts
    assert sum(weights[name] for name in sources["text"]) == 350  # GB
    assert sources["image_text"]["cc12m"].path == f"{here}/cc12m/*.tar"
    assert (config.tokenizer.path, config.init_from) == (
        f"{here}/bert-large-uncased/vocab.txt", f"{here}/clip-bert-large"
    )  # fmt: skip
    assert config.model.vocab_size == 30_522


@pytest.mark.parametrize("size", SIZES)
def test_the_paper_s_recipe_differs_in_data_tokenizer_and_start_alone(here: Path, size: str) -> None:
    ours, paper = (build(RunConfig, load_recipe(f"pretrain:{size}{variant}")) for variant in ("", ",paper"))
    for field in ("steps", "optimizer", "schedule", "mesh", "checkpoint"):
        assert getattr(ours, field) == getattr(paper, field)
    for name, stream in ours.streams.items():
        assert stream.objectives == paper.streams[name].objectives
        assert stream.data.batch_size == paper.streams[name].data.batch_size


def test_everything_that_is_missing_is_named_in_one_sentence_before_anything_starts(here: Path, tmp_path: Path) -> None:
    outcome = mplug2("train", "--config", "pretrain:base,paper", "--workdir", str(tmp_path / "run"))
    assert outcome.status == 2
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("mplug2: error: ")]
    assert line.startswith("mplug2: error: 12 of the files and folders that this run reads do not exist: ")
    for path in ("coco/dataset_coco.json", "vg", "webvid2m/*.tar", "bert-base-uncased/vocab.txt", "clip-bert-base"):
        assert f"{here}/{path}" in line
    assert "mplug2 corpora" in line
    assert not (tmp_path / "run").exists()


def test_a_corpus_is_described_with_what_is_missing(here: Path) -> None:
    outcome = mplug2("corpora", "vg")
    assert outcome.status == 0
    assert outcome.out.startswith("Visual Genome captions: 100K images, 769K texts\n")
    assert f"missing  {here}/vg/vg_caption.json" in outcome.out
    assert "licence: CC BY 4.0" in outcome.out
    (here / "vg").mkdir(parents=True)
    assert f"here     {here}/vg\n" in mplug2("corpora", "vg").out
    unknown = mplug2("corpora", "cc3n")
    assert unknown.status == 2
    assert "corpus 'cc3n' is unknown: did you mean 'cc3m'?" in unknown.err


def test_fetch_commands_write_where_sources_read() -> None:
    for corpus in CORPORA.values():
        folder = corpus.path.partition("/")[0]
        assert any(f"{folder}/" in step or step.endswith(folder) or f"/{folder} " in step for step in corpus.fetch)
