"""``mplug2 embed``: features of files, resuming, and errors."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from mplug2_jax.inference import features
from mplug2_jax.inference.feature_files import FeatureWriter
from tests.close import CHAIN, assert_close
from tests.data_pipelines.worlds import encode_media, records

from .conftest import TrainedRun, mplug2
from .test_bad_input import error_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write five images, one of them broken, to a folder and a folder in it."""
    path = tmp_path / "pictures"
    (path / "more").mkdir(parents=True)
    for i, record in enumerate(records("image", 4)):
        (path / ("more" if i > 1 else ".") / f"{i}.png").write_bytes(encode_media(record))
    (path / "more" / "broken.jpg").write_bytes(b"no picture")
    return path


KEYS = ["0.png", "1.png", "more/2.png", "more/3.png"]


def read(out: Path) -> tuple[list[str], np.ndarray]:
    """Return the ids and features of all shards of the index."""
    ids, rows = [], []
    for shard in json.loads((out / "index.json").read_text())["shards"]:
        with safe_open(out / shard["file"], "np") as file:
            ids += json.loads(file.metadata()["ids"])
            rows.append(file.get_tensor("features"))
    return ids, np.concatenate(rows)


def test_a_folder_is_embedded_and_broken_files_are_skipped(contrastive_run: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    words = ("embed", "--workdir", contrastive_run, folder, "--out", out)
    done = mplug2(*words)
    assert (done.status, done.out) == (1, f"{out / 'index.json'}: 4 ids in 1 shards\n")
    first, shard = [line for line in done.log.splitlines() if "step 1" in line or "ids" in line]
    assert first == "step 1: contrastive of 5 images, features [16] float32"
    assert shard == f"{out / 'features-00000.safetensors'}: 4 ids"
    path = folder / "more" / "broken.jpg"
    assert f"] skipped more/broken.jpg: {path} cannot be read as an image" in done.err
    ids, rows = read(out)
    assert ids == KEYS
    assert_close(np.linalg.norm(rows, axis=1), np.ones(4))
    request = json.loads((out / "index.json").read_text())["request"]
    assert (request["feature"]["name"], request["step"], request["model"]["run"]) == ("contrastive", 1, "small")
    assert request["arrays"] == {"features": {"shape": [16], "dtype": "float32"}}
    again = mplug2(*words)
    assert "resuming after 5 records\n" in again.log
    assert again.status == 1


@pytest.mark.slow
def test_a_command_that_was_killed_between_shards_resumes(
    contrastive_run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "SHARD_ROWS", 2)
    words = ("embed", "--workdir", contrastive_run, folder, "--feature", "pooled", "--out")
    mplug2(*words, tmp_path / "whole")
    write = FeatureWriter.write

    def killed(self: FeatureWriter, shard: features.FeatureShard) -> Path:
        if self.shards:
            raise KeyboardInterrupt
        return write(self, shard)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "write", killed)
        assert mplug2(*words, tmp_path / "parts").status == 130
    assert read(tmp_path / "parts")[0] == KEYS[:2]
    before = (tmp_path / "parts" / "features-00000.safetensors").stat().st_mtime_ns
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.data=4", "--batch-size", 8)
    assert "resuming after 2 records\n" in mplug2(*words, tmp_path / "parts", *mesh).log
    assert (tmp_path / "parts" / "features-00000.safetensors").stat().st_mtime_ns == before
    (ids, rows), (whole_ids, whole) = read(tmp_path / "parts"), read(tmp_path / "whole")
    assert ids == whole_ids == KEYS
    assert_close(rows, whole, CHAIN)


def test_a_different_request_is_an_error(contrastive_run: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "features"
    words = ("embed", "--workdir", contrastive_run, folder, "--out", out)
    mplug2(*words)
    before = (out / "index.json").read_bytes()
    message = error_of(mplug2(*words, "--feature", "visual/out", "--pool", "cls"))
    assert (
        "has other features: arrays.features.shape was [16] and is [32]; feature.name was 'contrastive' and" in message
    )
    (folder / "0.png").rename(folder / "9.png")
    assert "listing was" in error_of(mplug2(*words))
    assert (out / "index.json").read_bytes() == before


def test_the_texts_of_an_annotation_file_are_embedded_each(contrastive_run: Path, media: Path, tmp_path: Path) -> None:
    rows = [{"id": "x", "image": "a.png", "caption": ["a red digit", "a digit"]}, {"image": "b.png", "caption": "blue"}]
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = mplug2(
        "embed", "--workdir", contrastive_run, file, media / "a.txt", "--kind", "text", "--out", tmp_path / "f"
    )
    assert (done.status, done.err) == (0, "")
    ids, rows = read(tmp_path / "f")
    assert ids == [f"{file}/captions/x#0", f"{file}/captions/x#1", f"{file}/captions/2", str(media / "a.txt")]
    assert_close(rows[0], rows[3])  # the same words
    assert np.abs(rows[0] - rows[1]).max() > 1e-3


def test_the_clips_of_an_annotation_file_are_embedded(contrastive_run: Path, media: Path, tmp_path: Path) -> None:
    file = tmp_path / "clips.json"
    file.write_text(json.dumps([{"video": "a.mp4", "caption": "x"}, {"video": "a.gif", "caption": "y"}]))
    words = ("--feature", "vision/norm_pre", "--format", "npz", "--kind", "video", "--media", media)
    done = mplug2("embed", "--workdir", contrastive_run, file, *words, "--out", tmp_path / "f")
    assert (done.status, done.err) == (0, "")
    with np.load(tmp_path / "f" / "features-00000.npz", allow_pickle=False) as found:
        assert found["ids"].tolist() == ["clips/1", "clips/2"]
        assert found["features"].shape == (2, 2, 5, 32)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("{media}", "{media}: found 1 image and 1 text and 2 videos, expected one kind; select it with --kind"),
        ("{media}/a.png {media}/a.png", "{media}/a.png is given twice"),
        ("{media}/missing.png", "{media}/missing.png does not exist; expected .json, .jsonl, .csv, .tsv, .txt, an"),
        ("{media}/a.png --batch-size 9", "--batch-size=9 does not split over the mesh's 8 batch shards"),
        ("{media}/a.png --batch-size 0", "--batch-size=0 must be at least 1"),
        ("{media}/a.txt --text-length 2", "--text-length=2 must be between 3 and 64"),
        ("{media}/a.png --feature visual/ou", "feature 'visual/ou' does not exist for images: did you"),
        ("{media}/a.png --pool mean", "--pool mean is for the tokens of a tap, but feature 'contrastive' is one"),
        ("{media}/a.png --split x", "source.split='x' is not read by format 'files'"),
        ("{media}/a.mp4 --kind image", "{media}/a.mp4 contains no image files"),
        ("webdatase:{media}", "webdatase:{media} does not exist; expected"),
    ],
)
def test_invalid_inputs_are_errors(
    words: str, expected: str, contrastive_run: Path, media: Path, tmp_path: Path
) -> None:
    out = tmp_path / "features"
    sentence = error_of(mplug2("embed", "--workdir", contrastive_run, *words.format(media=media).split(), "--out", out))
    assert sentence.startswith(expected.format(media=media))
    assert not out.exists()


def test_a_model_without_the_parts_is_an_error(trained: TrainedRun, media: Path, tmp_path: Path) -> None:
    words = ("embed", "--workdir", trained.workdir, "--out", tmp_path / "f")
    assert error_of(mplug2(*words, media / "a.txt")) == (
        "feature 'contrastive' of texts needs the parts contrastive, which this model lacks (it has text, universal, "
        "mlm)"
    )
    assert "needs the parts vision, contrastive" in error_of(mplug2(*words, media / "a.png"))
    assert mplug2(*words, media / "a.txt", "--feature", "text/out", "--pool", "cls").status == 0
