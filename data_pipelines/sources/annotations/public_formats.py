"""Public formats of captions, questions and labels for images and videos."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from data_pipelines.config import Kind
from data_pipelines.errors import DataError
from data_pipelines.record import Record, check_index
from data_pipelines.sources.annotations.fields import question_with_ranked_answers
from data_pipelines.sources.annotations.layouts import detect_format, group_by_id, normalize_id, read_rows
from data_pipelines.sources.annotations.media import find_media
from data_pipelines.sources.annotations.rows import Row, filter_split, read_json
from data_pipelines.sources.annotations.source import AnnotationFormat, MediaContext
from data_pipelines.sources.annotations.tables import read_table
from data_pipelines.sources.files import is_hidden, list_folder, make_media, media_kind, read_text


def _read_lists(path: str, *names: str) -> Mapping[str, Any]:
    """Read a JSON object with lists of the given names.

    Raises:
        DataError: other content.
    """
    content = read_json(path)
    for name in names:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            found = ", ".join(list(content)[:8]) if isinstance(content, dict) else f"a {type(content).__name__}"
            format = detect_format(content) or ("annotations" if isinstance(content, list) else "")
            hint = f"its format is '{format}'" if format else "is it of another format?"
            raise DataError(f"{path} has no list '{name}'; found {found}; {hint}")
    return content


def _rows(path: str, items: Sequence[Any]) -> Iterator[Row]:
    for number, item in enumerate(items, 1):
        yield Row(path, number, item if isinstance(item, dict) else {"item": item})


def _read_coco(files: Sequence[str], split: str) -> Iterator[Row]:
    """Yield a row for each image, with all its captions, in the order of the images; NoCaps' domains are splits."""
    for file in files:
        content = _read_lists(file, "images", "annotations")
        images, annotations = content["images"], content["annotations"]
        if annotations and not any("caption" in item for item in annotations if isinstance(item, dict)):
            found = ", ".join(annotations[0]) if isinstance(annotations[0], dict) else "none"
            raise DataError(f"{file} has no captions: the fields of its annotations are {found[:120]}")
        ids = [row.fields().get("id") for row in _rows(file, images)]
        captions = group_by_id(file, annotations, "image_id", "caption", ids)
        for row in filter_split(_rows(file, images), split, "domain"):
            yield Row(file, row.number, {**row.fields(), "captions": captions[normalize_id(row.fields().get("id"))]})


def _to_record_coco(row: Row, context: MediaContext) -> Record:
    name = row.text("file_name")
    media = find_media(context.folder, context.kind, name)
    return Record(_key(row, row.text("id")), name, media=media, captions=row.texts("captions"))


def _read_karpathy(files: Sequence[str], split: str) -> Iterator[Row]:
    for file in files:
        yield from filter_split(_rows(file, _read_lists(file, "images")["images"]), split, "split")


def _to_record_karpathy(row: Row, context: MediaContext) -> Record:
    name = row.text("filename")
    folder = row.find(("filepath",))
    media = find_media(context.folder, context.kind, *([f"{folder}/{name}"] if folder else []), name)
    return Record(_key(row, row.text("cocoid", "imgid")), name, media=media, captions=row.texts("sentences"))


def _read_vqa(files: Sequence[str], split: str) -> Iterator[Row]:
    """Yield a row for each question; the files of questions and answers may be in any order."""
    del split
    annotations: list[Any] = []
    questions: list[tuple[Row, str]] = []
    for file in files:
        content = read_json(file)
        if isinstance(content, dict) and "annotations" in content:
            annotations += _read_lists(file, "annotations")["annotations"]
        else:
            content = _read_lists(file, "questions")
            questions += [(row, content.get("data_subtype", "")) for row in _rows(file, content["questions"])]
    if not questions:
        raise DataError(f"{files[0]} has answers and no questions; use a pattern that matches both files")
    ids = [row.fields().get("question_id") for row, _ in questions]
    answers_of = group_by_id(files[0], annotations, "question_id", "answers", ids)
    for row, subtype in questions:
        answers = answers_of[normalize_id(row.fields().get("question_id"))]
        answer_field = {"answers": answers[0]} if answers else {}
        yield Row(row.file, row.number, {**row.fields(), "subtype": subtype, **answer_field})


def _to_record_vqa(row: Row, context: MediaContext) -> Record:
    number = row.text("image_id").zfill(12)
    names = (f"COCO_{row.find(('subtype',))}_{number}.jpg", f"{number}.jpg")
    media = find_media(context.folder, context.kind, *names)
    return Record(
        _key(row, row.text("question_id")),
        number,
        media=media,
        questions=(question_with_ranked_answers(row, "answers"),),
    )


_KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split", "is_cc")
_PATH_AND_CLASS = re.compile(r"(.+?)[\s,]+([^\s,]+)")


def _read_kinetics(files: Sequence[str], split: str) -> Iterator[Row]:
    for file in files:
        yield from filter_split(
            _kinetics_json(file) if file.lower().endswith(".json") else _kinetics_table(file), split, "split"
        )


def _kinetics_table(file: str) -> Iterator[Row]:
    """Read the official table, with or without its header, or lines of a video's path and class."""
    first = next(csv.reader([read_text(file).readline()]), [])
    if any("youtube" in name.lower() for name in first):
        return read_table(file, {"youtubeid"})
    if len(first) >= 4 and first[2].replace(".", "").isdigit():
        return read_table(file, columns=_KINETICS_COLUMNS)
    return _kinetics_list(file)


def _kinetics_list(file: str) -> Iterator[Row]:
    for number, line in enumerate(read_text(file), 1):
        if match := _PATH_AND_CLASS.fullmatch(line.strip()):
            yield Row(file, number, {"path": match[1], "class": match[2]})
        elif line.strip():
            yield Row(file, number, {"line": line.strip()[:80]})


def _kinetics_json(file: str) -> Iterator[Row]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}, expected an object of videos by their YouTube ids")
    for number, (name, video) in enumerate(content.items(), 1):
        annotation = video.get("annotations", {}) if isinstance(video, dict) else {}
        segment = annotation.get("segment") if isinstance(annotation, dict) else None
        if not isinstance(segment, list) or len(segment) != 2:
            yield Row(file, number, {}, "has no annotations with a segment of two times")
            continue
        fields = {"youtube_id": name, "time_start": segment[0], "time_end": segment[1], "split": video.get("subset")}
        yield Row(file, number, {**fields, "label": annotation.get("label")})


def _to_record_kinetics(row: Row, context: MediaContext) -> Record:
    """Return the record of a row. The folder of a video names its class better than a list's class number."""
    if path := row.find(("path",)):
        name, folder = PurePosixPath(path), PurePosixPath(path).parent.name
        label = folder.replace("_", " ") or row.text("class")
        media = find_media(context.folder, context.kind, path)
        return Record(_key(row, str(name.with_suffix(""))), path, media=media, label=label)
    video, label = row.text("youtube_id"), row.text("label")
    clip = f"{video}_{int(float(row.require('time_start'))):06}_{int(float(row.require('time_end'))):06}"
    folders = (label, label.replace(" ", "_"))
    names = (clip, video, *(f"{folder}/{name}" for folder in folders for name in (clip, video)))
    return Record(_key(row, clip), clip, media=find_media(context.folder, context.kind, *names), label=label)


def _read_ssv2(files: Sequence[str], split: str) -> Iterator[Row]:
    del split
    for file in files:
        yield from read_rows(file, {"label", "template"})


def _to_record_ssv2(row: Row, context: MediaContext) -> Record:
    number = row.text("id")
    label = re.sub(r"[\[\]]", "", row.text("template", "label"))
    media = find_media(context.folder, context.kind, f"{number}.webm", f"{number}.mp4")
    return Record(_key(row, number), number, media=media, captions=row.texts("label"), label=label)


def _key(row: Row, row_id: str) -> str:
    return f"{row.key.rpartition('/')[0]}/{row_id}"


_NOT_CLASSES = frozenset({
    "data", "images", "image", "img", "imgs", "jpegimages", "photos", "pictures", "test", "testing", "train",
    "training", "val", "valid", "validation", "videos",
})  # fmt: skip
"""Names, in lower case, of folders that hold all images or those of a split."""


class ImageFolder:
    """ImageNet's layout: a folder for each class, named after it, with its images, also in subfolders.

    Raises:
        DataError: no such folder, no images in its folders, or folders that are not classes.
    """

    def __init__(self, path: str, kind: Kind) -> None:
        self._folder, names = list_folder(path, "expected one with a folder for each class")
        media = [name for name in names if media_kind(name) and not is_hidden(name)]
        classes = sorted({name.partition("/")[0] for name in media if "/" in name})
        if not classes:
            raise DataError(f"{path} has no class folders with images; expected {path}/CLASS/NAME.jpg")
        if {name.lower() for name in classes} <= _NOT_CLASSES:
            raise DataError(
                f"{path} has the folders {', '.join(classes)}, which are not classes by their names; use the path "
                "of a folder with a folder for each class, or sort the images into such folders"
            )
        self._names, self._kind = media, kind

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        check_index(index, len(self), "image")
        name, path = self._names[index], f"{self._folder}/{self._names[index]}"
        label, slash, _ = name.partition("/")
        if not slash:
            raise DataError(f"{path} is in no class folder; expected {self._folder}/CLASS/{name}")
        return Record(name, media=make_media(path, self._kind), label=label)


COCO = AnnotationFormat((".json",), _read_coco, _to_record_coco, has_splits=True)
KARPATHY = AnnotationFormat((".json",), _read_karpathy, _to_record_karpathy, has_splits=True)
VQA = AnnotationFormat((".json",), _read_vqa, _to_record_vqa)
KINETICS = AnnotationFormat((".csv", ".json", ".txt"), _read_kinetics, _to_record_kinetics, has_splits=True)
SSV2 = AnnotationFormat((".json",), _read_ssv2, _to_record_ssv2)
