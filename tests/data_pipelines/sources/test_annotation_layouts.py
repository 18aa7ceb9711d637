"""Annotation files in custom layouts: read if the meaning is clear, otherwise one error."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.config import Format
from data_pipelines.errors import DataError
from data_pipelines.record import Record, Source

from ..worlds import open_annotations

ROWS = [{"image": "p0.jpg", "caption": "one"}, {"image": "p1.jpg", "caption": "two"}]
READ = [("p0.jpg", ("one",)), ("p1.jpg", ("two",))]
LINES = [json.dumps(row) for row in ROWS]
VIDEOS = {
    "videos": [{"video_id": name, "split": "train"} for name in ("p0.jpg", "p1.jpg")],
    "sentences": [{"video_id": "p1.jpg", "caption": "two"}, {"video_id": "p0.jpg", "caption": "one"}],
}


def open_file(path: Path, content: str | bytes, format: Format = "annotations", **settings: Any) -> Source:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_annotations(format, path, **settings)


def read_all(source: Source) -> list[Record | str]:
    """Return the records, or their errors."""
    results: list[Record | str] = []
    for index in range(len(source)):
        try:
            results.append(source[index])
        except DataError as error:
            results.append(str(error))
    return results


def ids_and_captions(source: Source) -> list[Any]:
    return [(each.visual_id, each.captions) if isinstance(each, Record) else each for each in read_all(source)]


SHAPES: dict[str, str | bytes] = {
    "list.json": json.dumps(ROWS),
    "blank before.json": "\n \t" + json.dumps(ROWS, indent=1),
    "mark.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "utf-16.json": json.dumps(ROWS).encode("utf-16"),
    "lines.jsonl": "\n".join(LINES),
    "lines.JSONL": "\r\n".join(LINES),
    "old mac.jsonl": "\r".join(LINES),
    "joined.jsonl": "\ufeff" + "\n\ufeff".join(LINES),
    "joined.csv": "\ufeffimage,caption\np0.jpg,one\n\ufeffimage,caption\np1.jpg,two\n",
    "no lines.jsonl": "".join(LINES),
    "commas.jsonl": ",\n".join(LINES) + ",\n",
    "indented.json": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "last comma.json": f"[{LINES[0]},\n{LINES[1]},\n]\n",
    "wrapped.json": json.dumps({"version": 1, "data": ROWS}),
    "wrapped twice.json": json.dumps({"version": "1", "data": {"rows": ROWS}}, indent=1),
    "described.json": json.dumps({"description": "a set of mine", "annotations": ROWS}),
    "splits.json": json.dumps({"train": ROWS[:1], "val": ROWS[1:], "test": []}),
    "ids.json": json.dumps({"a": ROWS[0], "b": ROWS[1]}),
    "names.json": json.dumps({"p0.jpg": {"caption": "one"}, "p1.jpg": {"caption": ["two"]}}, indent=4),
    "captions.json": json.dumps({"p0.jpg": ["one"], "p1.jpg": ["two"]}),
    "split ids.json": json.dumps({"train": {"a": ROWS[0]}, "val": {"b": ROWS[1]}}),
    "columns.json": json.dumps({name: {str(i): ROWS[i][name] for i in range(2)} for name in ROWS[0]}),
    "lists.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    "pandas split.json": json.dumps({"columns": list(ROWS[0]), "data": [list(row.values()) for row in ROWS]}),
    "msrvtt.json": json.dumps(VIDEOS),
    "msrvtt indented.json": json.dumps(VIDEOS, indent=4),
    "upper.csv": "Image,Caption\np0.jpg,one\np1.jpg,two\n",
    "spaces.csv": 'image, caption\np0.jpg, one\np1.jpg, "two"\n',
    "ends.csv": "image,caption\np0.jpg,one,\np1.jpg,two,,\n",
    "semicolons.csv": "image;caption\np0.jpg;one\np1.jpg;two\n",
    "pipes.csv": "image_name| comment_number| comment\np0.jpg| 0| one\np1.jpg| 0| two\n",
    "captions.txt": "image,caption\np0.jpg,one\np1.jpg,two\n",
    "header twice.csv": "image,caption\np0.jpg,one\nimage,caption\np1.jpg,two\n,\n",
    "nan.jsonl": '{"image": "p0.jpg", "caption": ["one", NaN]}\n{"image": "p1.jpg", "caption": "two", "id": 1e999}',
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_rows_are_found_without_warnings(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert ids_and_captions(open_file(tmp_path / name, SHAPES[name])) == READ
    assert caplog.messages == []


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_single_object_is_one_row(suffix: str, tmp_path: Path) -> None:
    row = {**ROWS[0], "regions": [{"bbox": [1, 2, 3, 4]}], "meta": {"a": {"b": 1}}}
    assert ids_and_captions(open_file(tmp_path / f"a{suffix}", json.dumps(row))) == READ[:1]


def test_splits_are_selected_by_the_names_in_the_file(tmp_path: Path) -> None:
    path, content = tmp_path / "a.json", json.dumps({"train": ROWS[:1], "val": ROWS[1:]})
    assert ids_and_captions(open_file(path, content, split="val")) == READ[1:]
    with pytest.raises(DataError, match="split 'test' is not in the file; its splits are train, val"):
        open_file(path, content, split="test")
    good, cut = ids_and_captions(
        open_file(tmp_path / "b.jsonl", f'{json.dumps({**ROWS[0], "split": "val"})}\n{{"cut', split="val")
    )
    assert good == READ[0]
    assert "b.jsonl row 2 is not valid JSON" in cut


TABLES = {
    "open.csv": ('image,caption\np0.jpg,"one\np1.jpg,two\np2.jpg,three\n', ['"one', "two", "three"]),
    "closed later.csv": ('image,caption\np0.jpg,"one\np1.jpg,two\np2.jpg,tv 42"\n', ['"one', "two", 'tv 42"']),
    "goes on.csv": ('image,caption\np0.jpg,"Stop" it says\np1.jpg,two\n', ['"Stop" it says', "two"]),
    "whole.csv": ('image,caption\np0.jpg,"A ""b"", c"\np1.jpg,"one\ntwo, three"\n', ['A "b", c', "one\ntwo, three"]),
    "inner.csv": ('image,caption\np0.jpg,a 42" tv\np1.jpg,two\n', ['a 42" tv', "two"]),
    "pandas.tsv": ('image\tcaption\np0.jpg\t"a ""b"""\np1.jpg\t"one\ntwo"\np2.jpg\t"x\n', ['a "b"', "one\ntwo", '"x']),
    "listed.csv": ("image,caption\np0.jpg,\"['one', 'it''s']\"\np1.jpg,\"[\"\"two\"\"]\"\n", None),
    "columns.csv": ("image,caption,caption\np0.jpg,one,uno\n", [("one", "uno")]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_quotes_in_tables(name: str, tmp_path: Path) -> None:
    content, expected = TABLES[name]
    captions = [captions for _, captions in ids_and_captions(open_file(tmp_path / name, content))]
    expected = expected or [("one", "its"), ("two",)]
    assert captions == [each if isinstance(each, tuple) else (each,) for each in expected]


REFUSED: dict[str, tuple[Format, str, str, str]] = {
    "coco": ("annotations", "a.json", '{"images": [{"id": 1}], "annotations": []}', "has format 'coco_captions'"),
    "karpathy": ("annotations", "a.json", '{"images": [{"sentences": []}]}', "has format 'karpathy'"),
    "vqa": ("coco_captions", "a.json", '{"questions": [{"question_id": 1}]}', "its format is 'vqa_v2'"),
    "rows": ("karpathy", "a.json", "[]", "its format is 'annotations'"),
    "boxes": ("coco_captions", "a.json", '{"images": [], "annotations": [{"id": 1, "bbox": []}]}',
              "has no captions: the fields of its annotations are id, bbox"),
    "no header": ("annotations", "a.csv", "p0.jpg,one\n", "begins with the line 'p0.jpg,one', expected a header"),
    "damaged": ("annotations", "a.json", '{\n "image": "p0.jpg",\n', "is not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_files_of_another_format_are_named(name: str, tmp_path: Path) -> None:
    format, file, content, expected = REFUSED[name]
    with pytest.raises(DataError) as refused:
        open_file(tmp_path / file, content, format)
    assert expected in str(refused.value)


FAULTS: dict[str, tuple[str, str]] = {
    '{"image": "a.jpg", "captoin": "x"}': ("captoin", "; rename captoin to caption if it is that"),
    '{"image": "a.jpg", "caption": NaN}': ("caption", ": caption is empty"),
    '{"image": "a.jpg", "desc": {"a": 1}}': ("desc", "desc holds objects with the fields a, expected texts"),
    '{"image": "a.jpg", "answer": "x", "question": [1]}': ("question", "question is a list, expected text"),
    '{"image": ["a.jpg"], "caption": "x"}': ("image", "image is a list, expected text"),
    '{"image": "a.jpg", "caption": "x \\ud83d"}': ("caption", r"caption 'x \ud83d' is not Unicode text: unpaired"),
    '{"image": "a\\udc00.jpg", "caption": "x"}': ("image", r"image 'a\udc00.jpg' is not Unicode text: unpaired"),
    '{"image": "a.jpg", "caption": "x", "id": "\\ud83d"}': ("id", r"id '\ud83d' is not Unicode text: unpaired"),
    '{"image": "a.jpg", "caption": "\\u200b\\ufeff\\u00a0"}': ("caption", ": caption is empty"),
    '{"image": "a.jpg", "phrase": "x", "bbox": [1, 1, 0, 5], "width": 9, "height": 9}': ("box", "of 0 x 5 pixels"),
}  # fmt: skip


@pytest.mark.parametrize("row", FAULTS)
def test_a_bad_row_is_one_error_with_its_field(row: str, tmp_path: Path) -> None:
    field, expected = FAULTS[row]
    first, message, last = ids_and_captions(open_file(tmp_path / "a.jsonl", f"{LINES[0]}\n{row}\n{LINES[1]}\n"))
    assert [first, last] == READ
    assert message.startswith(f"{tmp_path}/a.jsonl row 2")
    assert field in message
    assert expected in message


def test_a_table_row_with_too_many_cells_is_one_error(tmp_path: Path) -> None:
    message, good, short = ids_and_captions(
        open_file(tmp_path / "a.csv", "image,caption\np0.jpg,a dog, running\np1.jpg,two\np2.jpg\n")
    )
    assert "a.csv row 2 has 3 cells, expected 2 as in the header; quote cells with delimiters" in message
    assert good == READ[1]
    assert "row 4 has no " in short


def test_captions_of_images_that_are_not_listed_are_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = {
        "images": [{"id": "0001", "file_name": "p0.jpg"}, {"id": 2, "file_name": "p1.jpg"}],
        "annotations": [
            {"image_id": 1, "caption": "one"}, {"image_id": 3, "caption": "lost"}, {"image_id": 4, "caption": "lost"},
            {"image_id": 2.0, "caption": None}, {"image_id": 2, "caption": "two"}, 7,
        ],
    }  # fmt: skip
    assert ids_and_captions(open_file(tmp_path / "a.json", json.dumps(content), "coco_captions")) == READ
    (message,) = caplog.messages
    assert message.endswith("a.json: skipped 3 caption entries whose image_id is not listed; the first is '3'")


def read_answers(content: Any, path: Path) -> tuple[str, ...]:
    record = read_all(open_file(path, json.dumps([content])))[0]
    assert isinstance(record, Record), record
    return (record.questions[0].answer, *record.questions[0].alternative_answers)


def test_answers_in_all_their_forms(tmp_path: Path) -> None:
    row, path = {"image": "p0.jpg", "question": "what?"}, tmp_path / "a.json"
    many = [{"answer": answer, "answer_id": i} for i, answer in enumerate(["", "no", "yes", "", "yes", ""])]
    assert read_answers({**row, "answers": many}, path) == ("yes", "yes", "no", "", "", "")
    assert read_answers({**row, "answer": ["red", "dark red"], "weight": [0.3, 0.9]}, path) == ("dark red", "red")
    assert read_answers({**row, "answer": True}, path) == ("yes",)
    assert read_answers({**row, "answer": 2.0}, path) == ("2",)
    assert read_answers({**row, "answers": ["a", None, "b", "b"]}, path) == ("b", "b", "a", "")


def test_vqa_answers_of_all_annotators_are_read_and_a_question_without_answers_is_one_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {1: ["yes"] * 2 + [""] * 3 + ["no"] * 5, 2: [""] * 10, 3: [""] * 6 + ["yes"] * 4}
    questions = [{"image_id": 1, "question_id": id, "question": "is it?"} for id in (*given, 4)]
    answers = [{"question_id": id, "answers": [{"answer": a} for a in each]} for id, each in given.items()]
    (tmp_path / "vqa_a.json").write_text(json.dumps({"annotations": [*answers, {"question_id": 9, "answers": []}]}))
    (tmp_path / "vqa_q.json").write_text(json.dumps({"questions": questions}))
    source = open_annotations("vqa_v2", tmp_path / "vqa_*.json")
    (message,) = caplog.messages
    assert "skipped 1 answers entries whose question_id is not listed" in message
    first, blank, third, without = read_all(source)
    assert isinstance(first, Record)
    assert isinstance(third, Record)
    given = [(record.questions[0].answer, *record.questions[0].alternative_answers) for record in (first, third)]
    assert given == [("no",) * 5 + ("yes",) * 2 + ("",) * 3, ("yes",) * 4 + ("",) * 6]
    assert "row 2: answers is empty" in str(blank)
    assert "row 4 has no answers" in str(without)


def test_referring_expressions_in_nested_sentences(tmp_path: Path) -> None:
    row = {
        "image": "p0.jpg", "bbox": [1, 2, 3, 4], "width": 10, "height": 10,
        "sentences": [{"sent": "left", "raw": "Left"}],
    }  # fmt: skip
    record = read_all(open_file(tmp_path / "a.json", json.dumps([row])))[0]
    assert isinstance(record, Record)
    assert [each.text for each in record.expressions] == ["Left"]
