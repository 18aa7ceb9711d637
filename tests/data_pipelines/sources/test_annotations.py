"""Annotation files in public formats, made of DigitWorld: every field is read, bad rows give errors."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.config import VisualConfig
from data_pipelines.errors import DataError
from data_pipelines.record import Entailment, Expression, Question, Record
from data_pipelines.sources.annotations import fields, glue, public_formats
from data_pipelines.sources.annotations.source import AnnotationSource
from data_pipelines.sources.formats import FORMATS
from data_pipelines.visual import load_visual

from ..worlds import SIZE, encode_media, open_annotations, records

VISUAL = VisualConfig(image_size=SIZE, num_frames=4)


def lines(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def write_media(path: Path, kind: str, index: int = 0) -> Record:
    """Write a DigitWorld image or video as a file."""
    record = records(kind, index + 1)[index]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_media(record))
    return record


def check_media(record: Record, original: Record) -> None:
    """Check that the record's media have the original's pixels (videos: nearly)."""
    assert record.media is not None
    assert original.frames is not None
    config = VISUAL if len(original.frames) > 1 else VisualConfig(image_size=SIZE, num_frames=1)
    frames = load_visual(record.media, config, np.random.default_rng(0)).frames
    assert np.abs(frames.astype(int) - original.frames).mean() < 12


# The release's files


def test_release_questions_about_clips(tmp_path: Path) -> None:
    clip = write_media(tmp_path / "videos" / "video7.mp4", "video")
    write_media(tmp_path / "videos" / "video8.avi", "video")
    write_media(tmp_path / "videos" / "tumblr_x1.gif", "image")
    rows = [{"video_id": name, "question": f"what is {name}?", "answer": "a digit"} for name in ("video7", "video8")]
    path = lines(tmp_path / "qa.jsonl", *rows, {"video_id": "tumblr_x1", "question": "who?", "answer": 3})
    source = open_annotations("annotations", path, kind="video", media=str(tmp_path / "videos"))
    assert [source[i].questions for i in range(3)] == [
        (Question("what is video7?", "a digit"),), (Question("what is video8?", "a digit"),), (Question("who?", "3"),)
    ]  # fmt: skip
    assert [Path(str(source[i].media and source[i].media.data)).name for i in range(3)] == [
        "video7.mp4", "video8.avi", "tumblr_x1.gif"
    ]  # fmt: skip
    assert [source[i].key for i in range(3)] == ["qa/1", "qa/2", "qa/3"]
    assert source[0].visual_id == "video7"
    check_media(source[0], clip)


def test_release_captions_for_training_and_testing(tmp_path: Path) -> None:
    write_media(tmp_path / "v1.mp4", "video")
    train = open_annotations(
        "annotations", lines(tmp_path / "train.jsonl", {"video_id": "v1", "caption": " a man "}), kind="video"
    )
    test = open_annotations(
        "annotations",
        lines(tmp_path / "test.jsonl", {"video_id": "v1", "golden_captions": ["A man", "walks"]}),
        kind="video",
    )
    assert (train[0].captions, test[0].captions) == (("a man",), ("A man", "walks"))


def test_release_retrieval_lists(tmp_path: Path) -> None:
    image = write_media(tmp_path / "images" / "a" / "1.png", "image")
    (tmp_path / "r.json").write_text(json.dumps([{"image": "a/1.png", "caption": ["x", "y"]}, 3]))
    source = open_annotations("annotations", tmp_path / "r.json", media=str(tmp_path / "images"))
    assert source[0].captions == ("x", "y")
    check_media(source[0], image)
    with pytest.raises(DataError, match=r"r\.json row 2 holds a int, expected named fields"):
        source[1]


def test_several_files_are_one_source(tmp_path: Path) -> None:
    for name in ("b", "a"):
        lines(tmp_path / f"{name}.jsonl", {"text": name})
    source = open_annotations("annotations", tmp_path / "*.jsonl", kind="text")
    assert [source[i].texts for i in range(2)] == [("a",), ("b",)]


# Public formats


def test_coco_captions(tmp_path: Path) -> None:
    image = write_media(tmp_path / "val2014" / "COCO_val2014_000000000042.jpg", "image")
    content = {
        "images": [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}, {"id": 43, "file_name": "x.jpg"}],
        "annotations": [{"image_id": 42, "id": 1, "caption": "one"}, {"image_id": 42, "id": 2, "caption": "two"}],
    }
    lines(tmp_path / "captions_val2014.json", content)
    source = open_annotations("coco_captions", tmp_path / "captions_val2014.json", media=str(tmp_path / "val2014"))
    assert [(source[i].key, source[i].captions) for i in range(2)] == [
        ("captions_val2014/42", ("one", "two")), ("captions_val2014/43", ())
    ]  # fmt: skip
    check_media(source[0], image)


def test_karpathy_splits(tmp_path: Path) -> None:
    image = write_media(tmp_path / "coco" / "val2014" / "a.jpg", "image")
    write_media(tmp_path / "coco" / "b.jpg", "image")
    images = [
        {"filepath": "val2014", "filename": "a.jpg", "imgid": 0, "split": "test", "sentences": [{"raw": "A cat. "}]},
        {"filename": "b.jpg", "imgid": 1, "cocoid": 391895, "split": "restval",
         "sentences": [{"raw": "B"}, {"raw": "C"}]},
        {"filename": "c.jpg", "imgid": 2, "split": "train", "sentences": [{"tokens": ["d"]}]},
    ]  # fmt: skip
    path = lines(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    media = str(tmp_path / "coco")
    test = open_annotations("karpathy", path, media=media, split="test")
    assert (len(test), test[0].key, test[0].captions) == (1, "dataset_coco/0", ("A cat.",))
    check_media(test[0], image)
    train = open_annotations("karpathy", path, media=media, split="train+restval")
    assert (train[0].key, train[0].captions) == ("dataset_coco/391895", ("B", "C"))  # as COCO's server knows it
    with pytest.raises(DataError, match=r"dataset_coco\.json row 3: sentences holds objects with the fields tokens"):
        train[1]
    with pytest.raises(DataError, match="split 'val' is not in the file; its splits are restval, test, train"):
        open_annotations("karpathy", path, media=media, split="val")


def test_vqa_v2_ranks_the_ten_answers(tmp_path: Path) -> None:
    image = write_media(tmp_path / "val2014" / "COCO_val2014_000000000009.jpg", "image")
    questions = {"data_subtype": "val2014", "questions": [
        {"image_id": 9, "question": "what?", "question_id": 9001},
        {"image_id": 9, "question": "who?", "question_id": 9002},
    ]}  # fmt: skip
    given = ["one", "two", "two", "three", "two", "one", "two", "two", "three", "three"]
    annotations = {"annotations": [{"question_id": 9001, "answers": [{"answer": a} for a in given]}]}
    lines(tmp_path / "v2_mscoco_val2014_annotations.json", annotations)
    lines(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", questions)
    source = open_annotations("vqa_v2", tmp_path / "v2_*val2014*.json", media=str(tmp_path / "val2014"))
    assert source[0].questions == (Question("what?", "two", "", (*["two"] * 4, *["three"] * 3, "one", "one")),)
    assert source[0].key == "v2_OpenEnded_mscoco_val2014_questions/9001"
    check_media(source[0], image)
    with pytest.raises(DataError, match=r"questions\.json row 2 has no answers"):
        source[1]
    with pytest.raises(DataError, match="has answers and no questions; use a pattern that matches both files"):
        open_annotations("vqa_v2", tmp_path / "*annotations.json")


def test_boxes_of_referring_expressions(tmp_path: Path) -> None:
    write_media(tmp_path / "a.png", "image")
    path = lines(
        tmp_path / "refcoco.json",
        {"image": "a.png", "ref_id": 5, "sents": ["left", "the left one"], "bbox": [4, 0, 8, 16]},
        {"image": "a.png", "expression": "right", "bbox": [10, 20, 30, 40], "width": 100, "height": 200},
        {"image": "a.png", "expression": "out", "bbox": [90, 0, 30, 40], "width": 100, "height": 200},
        {"image": "gone.png", "expression": "x", "bbox": [0, 0, 1, 1]},
        {"image": "a.png", "expression": "x", "bbox": [0, 0, 1]},
    )
    source = open_annotations("annotations", path)
    box = (0.25, 0.0, 0.75, 1.0)  # of a picture of 16 pixels
    assert source[0].expressions == (Expression("left", box), Expression("the left one", box))
    assert source[0].key == "refcoco/5"
    assert source[1].expressions == (Expression("right", (0.1, 0.1, 0.4, 0.3)),)
    for index, message in (
        (2, "a box from 0.90, 0.00 to 1.20, 0.20"),
        (3, "no usable box .*No such file"),
        (4, "no usable box"),
    ):
        with pytest.raises(DataError, match=rf"refcoco\.json row {index + 1} has .*{message}"):
            source[index]


def test_kinetics_as_csv_and_json(tmp_path: Path) -> None:
    clip = write_media(tmp_path / "clips" / "abc_000003_000013.mp4", "video")
    write_media(tmp_path / "clips" / "waving" / "-d.mp4", "video")
    (tmp_path / "k.csv").write_text(
        'label,youtube_id,time_start,time_end,split\n"tossing, coin",abc,3,13,val\nwaving,-d,0,10,train\n'
    )
    message = {
        "abc": {"annotations": {"label": "tossing, coin", "segment": [3.0, 13.0]}, "subset": "val"},
        "-d": {"annotations": {"label": "waving", "segment": [0.0, 10.0]}, "subset": "train"},
    }
    lines(tmp_path / "k.json", message)
    for name in ("k.csv", "k.json"):
        source = open_annotations("kinetics", tmp_path / name, media=str(tmp_path / "clips"), kind="video", split="val")
        assert (len(source), source[0].label, source[0].key) == (1, "tossing, coin", "k/abc_000003_000013")
        check_media(source[0], clip)
        other = open_annotations(
            "kinetics", tmp_path / name, media=str(tmp_path / "clips"), kind="video", split="train"
        )[0].media
        assert other is not None
        assert other.name.endswith("clips/waving/-d.mp4")


def test_something_something(tmp_path: Path) -> None:
    path = lines(tmp_path / "val.json", [{"id": "78", "label": "holding a pen", "template": "Holding [something]"}])
    record = open_annotations("ssv2", path, kind="video")[0]
    assert (record.key, record.label, record.captions) == ("val/78", "Holding something", ("holding a pen",))
    assert record.media is not None
    assert record.media.name == f"{tmp_path}/78.webm"


def test_image_folders(tmp_path: Path) -> None:
    image = write_media(tmp_path / "train" / "n01" / "a.JPEG", "image")
    write_media(tmp_path / "train" / "n02" / "b.png", "image")
    (tmp_path / "train" / "n02" / "notes.txt").write_text("x")
    source = open_annotations("image_folder", tmp_path / "train")
    assert [(source[i].key, source[i].label) for i in range(2)] == [("n01/a.JPEG", "n01"), ("n02/b.png", "n02")]
    check_media(source[0], image)
    with pytest.raises(DataError, match=r"has no class folders with images; expected .*/CLASS/NAME\.jpg"):
        open_annotations("image_folder", tmp_path / "train" / "n02")


GLUE: dict[str, tuple[str, Any, Any]] = {
    "CoLA": ("gj04\t1\t\tOur friends.\ngj04\t0\t*\tThem is.\n", "acceptable", "unacceptable"),
    "SST-2": ('sentence\tlabel\n"fine\t1\nawful\t0\n', "positive", "negative"),
    "MRPC": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta\tb\n0\t7\t8\tc\td\n",
             ("a", "b", "yes"), ("c", "d", "no")),
    "MNLI": ("index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tx\tneutral\n1\tc\td\tx\tcontradiction\n",
             ("a", "b", "maybe"), ("c", "d", "no")),
    "QNLI": ("index\tquestion\tsentence\tlabel\n0\twhy?\ts\tentailment\n1\two?\tt\tnot_entailment\n",
             ("s", "why?", "yes"), ("t", "wo?", "no")),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\ta\tb\t0\n1\t1\t2\tc\td\t1\n",
            ("a", "b", "no"), ("c", "d", "yes")),
    "RTE": ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\tc\td\tnot_entailment\n",
            ("a", "b", "yes"), ("c", "d", "no")),
    "WNLI": ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n1\tc\td\t0\n", ("a", "b", "yes"), ("c", "d", "no")),
    "STS-B": ("index\tgenre\tsentence1\tsentence2\tscore\n0\tg\ta\tb\t5.000\n1\tg\tc\td\t2.5\n", "5.000", "2.5"),
}  # fmt: skip


@pytest.mark.parametrize("task", GLUE)
def test_glue(task: str, tmp_path: Path) -> None:
    content, *expected = GLUE[task]
    (tmp_path / "dev.tsv").write_text(content)
    source = open_annotations("glue", tmp_path / "dev.tsv", kind="text")
    assert len(source) == 2
    assert [source[i].key for i in range(2)] == ["dev/0", "dev/1"]
    for i, meaning in enumerate(expected):
        if isinstance(meaning, tuple):
            assert source[i].entailments == (Entailment(*meaning),)
            assert source[i].texts == meaning[:2]
        else:
            assert source[i].label == meaning


def test_files_that_are_not_glue(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("one\ttwo\n1\t2\n")
    with pytest.raises(DataError, match=r"a\.tsv has the columns one, two, expected those of one of CoLA"):
        open_annotations("glue", tmp_path / "a.tsv", kind="text")
    (tmp_path / "b.tsv").write_text("sentence\tlabel\nfine\t7\n")
    with pytest.raises(DataError, match=r"b\.tsv row 2 has the label '7', expected one of 0, 1"):
        open_annotations("glue", tmp_path / "b.tsv", kind="text")[0]


def test_summaries(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('article,highlights\n"long\nstory",short\n')
    assert open_annotations("annotations", tmp_path / "a.csv", kind="text")[0].questions == (
        Question("long\nstory", "short", "summary"),
    )
    path = lines(tmp_path / "b.jsonl", {"document": "long", "summary": "short", "id": 9})
    record = open_annotations("annotations", path, kind="text")[0]
    assert (record.key, record.questions) == ("b/9", (Question("long", "short", "summary"),))


# What is wrong


def test_a_bad_line_fails_one_record_with_an_error(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "a.jsonl", {"text": "one"}, '{"text": "tw', "", {"text": "four"}, {"smell": 1}, [1], {"text": [[1]]}
    )
    source = open_annotations("annotations", path, kind="text")
    assert [source[i].texts for i in (0, 2)] == [("one",), ("four",)]
    for index, message in (
        (1, r"row 2 is not valid JSON \(Unterminated string"),
        (3, "row 5 has no golden_captions or .*; its fields are smell"),
        (4, "row 6 holds a list"), (5, "row 7: text holds a list, expected texts"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=rf"a\.jsonl {message}"):
            source[index]


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd.png", "a/../../x.png", "file:///etc/x.png", "..\\x.png"]
)
def test_names_do_not_leave_their_folder(name: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"image": name, "caption": "x"})
    with pytest.raises(DataError, match=r"leads out of .*; expected a name inside that folder"):
        open_annotations("annotations", path)[0]


def test_invalid_files_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"images": [1, 2')
    (tmp_path / "b.json").write_text('{"pictures": []}')
    (tmp_path / "c.csv").write_bytes(b"label,youtube_id\nok,1\ncaf\xe9,2\n")
    (tmp_path / "d.csv").write_text("a,b\n1,2\n")
    (tmp_path / "e.jsonl").write_text("")
    for format, name, message in (
        ("coco_captions", "a.json", r"a\.json is not valid JSON \("),
        ("coco_captions", "b.json", r"b\.json has no list 'images'; found pictures; is it of another format\?"),
        ("kinetics", "a.json", r"a\.json is not valid JSON"),
        ("kinetics", "c.csv", r"c\.csv is not UTF-8 text: .* in line 3; convert it"),
        ("annotations", "d.csv", r"d\.csv begins with the line 'a,b', expected a header with the names of the columns"),
        ("annotations", "e.jsonl", r"the source annotations \(image\) is empty: no record in .*e\.jsonl"),
        ("annotations", "f.jsonl", r"f\.jsonl does not exist; check the path"),
        ("image_folder", "g", r"g does not exist or is not a folder"),
    ):
        with pytest.raises(DataError, match=message):
            open_annotations(format, tmp_path / name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["images", "annotations", "questions", "id", "image_id", "caption", "file_name", "filename", "sentences", "raw",
         "answers", "question", "question_id", "youtube_id", "label", "segment", "bbox", "image", "width", "text"]
    ), inner, max_size=5),
    max_leaves=14,
)  # fmt: skip
FORMS = (
    fields.FORMAT, public_formats.COCO, public_formats.KARPATHY, public_formats.VQA, public_formats.KINETICS,
    public_formats.SSV2, glue.FORMAT,
)  # fmt: skip


@settings(max_examples=150)
@given(content=JSON, form=st.sampled_from(FORMS), as_line=st.booleans())
def test_any_json_gives_records_or_a_data_error(content: Any, form: Any, as_line: bool, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("any") / f"a{form.suffixes[0]}"
    path.write_text(json.dumps(content if as_line else [content]))
    try:
        source = AnnotationSource(form, str(path), "", "", "image")
    except DataError:
        return
    for i in range(len(source)):
        with contextlib.suppress(DataError):
            assert source[i].key


def test_every_format_that_reads_files_has_a_test() -> None:
    tested_elsewhere: Mapping[str, str] = {
        "array_record": "test_array_record", "captioned_folder": "test_folder", "files": "test_file_source",
        "webdataset": "test_webdataset", "tfds": "test_tfds",
    }  # fmt: skip
    here = Path(__file__).read_text()
    for format in set(FORMATS) - {"digitworld"}:
        assert (
            (Path(__file__).parent / f"{tested_elsewhere[format]}.py").exists()
            if format in tested_elsewhere
            else f'open_annotations("{format}"' in here
        )
