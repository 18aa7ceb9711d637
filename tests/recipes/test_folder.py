"""The recipe of a folder: its streams, its split, and the errors of folders that it cannot use."""

import math
from pathlib import Path

import pytest

from data_pipelines.storage.paths import to_path, upload_folder
from data_pipelines.tokenizers import vocab_fingerprint
from mplug2_jax.config import as_recipe, build, load_recipe
from mplug2_jax.errors import UserError
from mplug2_jax.recipes.folder import MIN_HELDOUT, MIN_RECORDS, split_folder
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.config_changes import find_changes
from mplug2_jax.training.workdir import load_or_train_tokenizer

WORDS = ("amber", "brass", "coral", "denim", "ebony")


def make_folder(folder: Path, images: int = 0, videos: int = 0) -> str:
    """Return the path of a folder of empty files, whose names are their captions."""
    folder.mkdir(exist_ok=True)
    for suffix, count in (("jpg", images), ("mp4", videos)):
        for i in range(count):
            (folder / f"{WORDS[i % 5]}_{suffix}_{i}.{suffix}").touch()
    return str(folder)


def run_of(arg: str) -> RunConfig:
    return build(RunConfig, load_recipe(f"folder:{arg}"))


@pytest.mark.parametrize("size", ["tiny", "base", "large"])
def test_the_streams_are_what_the_folder_holds(size: str, tmp_path: Path) -> None:
    images = run_of(f"{make_folder(tmp_path / 'images', images=40)},{size}")
    both = run_of(f"{make_folder(tmp_path / 'both', images=40, videos=40)},{size}")
    assert set(images.streams) == {"image_text", "text"}
    assert set(images.evaluations) == {"image_retrieval", "image_captions"}
    assert set(both.streams) == {"image_text", "video_text", "text"}
    assert len(both.evaluations) == 4
    assert both.parts()
    assert build(RunConfig, as_recipe(both)) == both


def test_streams_and_tokenizer_see_no_held_out_record(tmp_path: Path) -> None:
    run = run_of(f"{make_folder(tmp_path / 'a', images=100)},tiny,0.25")
    assert run.tokenizer.source
    training = [source for stream in run.streams.values() for source in stream.data.sources.values()]
    assert {source.hash_range for source in [*training, run.tokenizer.source]} == {(0.25, 1.0)}
    heldout = [source for each in run.evaluations.values() for source in each.data.sources.values()]
    assert {source.hash_range for source in heldout} == {(0.0, 0.25)}


def test_the_default_fraction_grows_as_folders_shrink(tmp_path: Path) -> None:
    small, large = (split_folder(make_folder(tmp_path / str(n), images=n)) for n in (20, 400))
    assert small.heldout > large.heldout == 0.05
    for split, total in ((small, 20), (large, 400)):
        assert MIN_HELDOUT <= total - split.num_train["image"] <= total / 2


def test_batches_and_steps_fit_the_folder(tmp_path: Path) -> None:
    run = run_of(make_folder(tmp_path / "a", images=20))
    num_train = split_folder(str(tmp_path / "a")).num_train["image"]
    batch_size = run.streams["image_text"].data.batch_size
    assert batch_size == run.tasks.vlm.group_size
    assert run.steps == math.ceil(20 * num_train / batch_size)
    shorter = load_recipe(f"folder:{tmp_path / 'a'}", ["--config.steps=3"])
    assert build(RunConfig, shorter).steps == 3


def test_a_few_videos_among_images_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_of(make_folder(tmp_path / "a", images=40, videos=2))
    assert set(run.streams) == {"image_text", "text"}
    assert "2 videos are not used" in caplog.text


def test_a_tokenizer_is_trained_on_the_captions(tmp_path: Path) -> None:
    run = run_of(make_folder(tmp_path / "a", images=40))
    tokenizer = load_or_train_tokenizer(run.tokenizer)
    assert tokenizer.decode(tokenizer.encode("amber coral", 8)) == "amber coral"
    assert tokenizer.decode(tokenizer.encode("mauve", 8)) != "mauve"


def test_a_tokenizer_needs_a_caption(tmp_path: Path) -> None:
    folder = Path(make_folder(tmp_path / "a", images=16))
    for image in folder.glob("*.jpg"):
        image.with_suffix(".txt").touch()
    with pytest.raises(UserError, match=r"config\.tokenizer\.source: none of the \d+ records of .* has a text"):
        load_or_train_tokenizer(run_of(str(folder)).tokenizer)


def test_a_folder_in_a_bucket_is_the_same_run(tmp_path: Path, bucket: str) -> None:
    local = run_of(make_folder(tmp_path / "a", images=20, videos=20))
    upload_folder(str(tmp_path / "a"), to_path(f"{bucket}/a"))
    remote = run_of(f"{bucket}/a,tiny")
    assert remote.tokenizer.source
    assert remote.tokenizer.source.path == f"{bucket}/a"
    assert find_changes(local, remote)
    assert {change.kind for change in find_changes(local, remote)} == {"runtime"}
    texts = (load_or_train_tokenizer(run.tokenizer) for run in (local, remote))
    assert len({vocab_fingerprint(tokenizer) for tokenizer in texts}) == 1


@pytest.mark.parametrize(
    ("arg", "sentence"),
    [
        ("", "takes a folder, a size and a fraction, as folder:PATH,tiny,0.05"),
        ("{few}", f"few has 5 images with captions, expected at least {MIN_RECORDS} of a kind; add some"),
        ("{some},tny", "did you mean 'tiny'?"),
        ("{some},tiny,most", "'most' should be the fraction to hold out, as 0.05"),
        ("{some},tiny,0.01", f"the fraction 0.01 holds out 1 of 30 images, expected at least {MIN_HELDOUT}"),
        ("{some},tiny,nan", f"expected at least {MIN_HELDOUT}"),
        ("{some},tiny,1", f"the fraction 1 holds out 30 of 30 images, expected at least {MIN_HELDOUT}"),
        ("{some},tiny,0.2,x", "takes a folder, a size and a fraction"),
    ],
)
def test_errors_are_one_sentence(arg: str, sentence: str, tmp_path: Path) -> None:
    few, some = make_folder(tmp_path / "few", images=5), make_folder(tmp_path / "some", images=30)
    with pytest.raises(UserError) as caught:
        load_recipe(f"folder:{arg.format(few=few, some=some)}")
    assert sentence in str(caught.value)
