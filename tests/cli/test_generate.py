"""``mplug2 generate`` on many files: batches change nothing, broken files are skipped."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.media import write_image, write_video
from mplug2_jax.inference.generator import Generator

from .conftest import Outcome, mplug2


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images, videos and texts of several lengths, in mixed order."""
    folder, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(1)
    (folder / "deep").mkdir()
    for i in range(11):
        frames = rng.integers(0, 256, (3, 32, 32, 3), np.uint8)
        if i % 3 == 0:
            write_image(folder / f"{i:02}.png", frames[0])
        elif i % 3 == 1:
            write_video(folder / "deep" / f"{i:02}.mp4", frames)
        else:
            (folder / f"{i:02}.txt").write_text("a small red digit moves " * i)
    return folder


def lines(done: Outcome) -> list[str]:
    assert (done.status, done.err) == (0, "")
    return done.out.splitlines()


@pytest.mark.parametrize("options", [("--num-beams", 2), ("--beams", 1, "--top-p", 0.99, "--temperature", 5)], ids=str)
@pytest.mark.slow
def test_answers_in_batches_are_those_of_one_at_a_time(
    options: tuple[object, ...], contrastive_run: Path, many: Path
) -> None:
    words = ("generate", "--workdir", contrastive_run, many, "--max-length", 4, *options)
    alone = lines(mplug2(*words, "--batch-size", 1))
    names = [*(f"{i:02}.{'png' if i % 3 == 0 else 'txt'}" for i in range(11) if i % 3 != 1),
             *(f"deep/{i:02}.mp4" for i in range(1, 11, 3))]  # fmt: skip
    assert [line.partition(": ")[0] for line in alone] == [str(many / name) for name in names]
    assert len({line.partition(": ")[2] for line in alone}) > 2
    assert lines(mplug2(*words, "--batch-size", 3)) == alone
    assert lines(mplug2(*words)) == alone


def test_one_program_serves_all_batches_of_a_kind(pictures: Path, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, make_arrays = [], Generator._arrays

    def record(self: Generator, loaded: object, rows: int) -> object:
        arrays = make_arrays(self, loaded, rows)
        shapes.append(tuple(sorted((name, value.shape) for name, value in arrays.items())))
        return arrays

    monkeypatch.setattr(Generator, "_arrays", record)
    files = [*sorted(many.glob("*.png")), many / "deep"]
    lines(mplug2("generate", "--workdir", pictures, *files, "--batch-size", 3, "--max-length", 2))
    assert len(shapes) == 4  # four of each kind, in batches of three
    assert len(set(shapes)) == 2


def test_predictions_are_written_to_a_file_too(pictures: Path, media: Path, tmp_path: Path) -> None:
    out = tmp_path / "predictions.jsonl"
    words = ("generate", "--workdir", pictures, media / "a.txt", media / "a.png", "--out", out)
    printed = lines(mplug2(*words, "--instruction", "is {text} here?", "--max-length", 3))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [f"{row['file']}: {row['prediction']}" for row in rows] == printed
    assert [row["instruction"] for row in rows] == ["is a red digit here?", "is {text} here?"]
    before = out.read_bytes()
    refused = mplug2(*words)
    assert (refused.status, out.read_bytes()) == (2, before)
    assert f"--out {out} exists; remove it, or choose another name" in refused.err
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_broken_files_among_many_are_skipped_with_a_warning(pictures: Path, media: Path, tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "c.mp4").write_bytes(b"no clip")
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    files = [tmp_path / "d.txt", media / "a.png", tmp_path / "b.png", tmp_path / "c.mp4", media / "a.txt"]
    out = tmp_path / "predictions.jsonl"
    words = ("generate", "--workdir", pictures, *files, "--top-p", 0.99, "--num-beams", 1, "--temperature", 5)
    done = mplug2(*words, "--max-length", 4, "--out", out)
    assert done.status == 1
    assert [line.partition(": ")[0] for line in done.out.splitlines()] == [str(files[1]), str(files[4])]
    assert len(out.read_text().splitlines()) == 2
    for file, line in zip((files[0], files[2], files[3]), done.err.splitlines(), strict=True):
        assert line.startswith("W")
        assert f"] skipped: {file} " in line
    whole = [files[1], *[media / "a.png"] * 2, files[4]]  # a file's seed is its index, even if others are skipped
    sampled = lines(mplug2(*words[:3], *whole, *words[8:], "--max-length", 4, "--seed", 1))
    assert [sampled[0], sampled[3]] == done.out.splitlines()


def test_a_folder_without_files_is_an_error(pictures: Path, tmp_path: Path) -> None:
    done = mplug2("generate", "--workdir", pictures, tmp_path)
    assert (done.status, done.out) == (2, "")
    assert f"{tmp_path} holds no image, video or .txt file; found 0 other files" in done.err
    assert mplug2("generate", "--workdir", pictures, tmp_path, "--batch-size", 0).status == 2
