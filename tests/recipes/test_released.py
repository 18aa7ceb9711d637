"""The release's protocol, from a data set's files to a score, as the release's golden files have it."""

import json
from pathlib import Path
from typing import Any

import av
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.examples import Example, make_detokenizer
from data_pipelines.loader import EvaluationSet
from data_pipelines.tokenizers import WordPieceTokenizer
from mplug2_jax.cli.main import main
from mplug2_jax.config import build, load_recipe
from mplug2_jax.conversion.parity.goldens import Golden, load_goldens
from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.model.vision import normalize_pixels
from mplug2_jax.tasks.base import TaskContext
from mplug2_jax.tasks.table import TASKS
from mplug2_jax.training.config import RunConfig
from tests.close import assert_close

PAGES = {"videoqa": "msrvtt_qa:tiny,released", "caption": "msrvtt_caption:tiny,released"}
LENGTH, FRAMES = 33, 4


@pytest.fixture(scope="module")
def words(reference: Path) -> dict[str, Any]:
    return json.loads((reference / "goldens" / "tokenizer.json").read_text())


@pytest.fixture(scope="module")
def pixels(reference: Path) -> dict[str, np.ndarray]:
    return dict(np.load(reference / "goldens" / "recipe_pixels.npz"))


@pytest.fixture
def data(reference: Path, words: Any, pixels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """MSRVTT as the release reads it, of one clip without loss: golden frames where it looks, and noise elsewhere."""
    cases = json.loads((reference / "goldens" / "recipe.json").read_text())["frame_indices"]
    (looked,) = (case["middle"] for case in cases if (case["vlen"], case["num_frames"]) == (LENGTH, FRAMES))
    height, width = pixels["frames_u8"].shape[1:3]
    frames = np.random.default_rng(0).integers(0, 256, (LENGTH, height, width, 3), np.uint8)
    frames[looked] = pixels["frames_u8"][[0, 1, 0, 1]]
    clip = tmp_path / "msrvtt" / "videos" / "video7010.avi"
    clip.parent.mkdir(parents=True)
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = height, width, "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    asked = [f"{text.capitalize()}?" for text in words["question_train"]["texts"]]
    asked.append(" ".join(["red"] * 60))
    rows = {
        "msrvtt_qa": [{"video_id": "video7010", "question": text, "answer": "Red"} for text in asked],
        "msrvtt_caption": [{"video_id": "video7010", "golden_captions": ["A man!", "a dog"]}],
    }
    for name, content in rows.items():
        for part in ("train", "test"):
            path = tmp_path / name / f"{part}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(f"{json.dumps(row)}\n" for row in content))
    monkeypatch.setenv("MPLUG2_DATA", str(tmp_path))
    return tmp_path


def page(task: str, size: int) -> RunConfig:
    return build(RunConfig, load_recipe(PAGES[task], [f"--config.evaluations.test.data.visual.image_size={size}"]))


@pytest.mark.parametrize("size", [28, 48])
@pytest.mark.parametrize("task", PAGES)
def test_what_is_seen_and_asked_is_what_the_release_makes_of_its_files(
    task: str, size: int, data: Path, words: Any, pixels: Any
) -> None:
    held = EvaluationSet(
        page(task, size).evaluations["test"].data, WordPieceTokenizer(words["vocab"]), name="test", seed=42
    )
    examples = [held[i] for i in range(len(held))]
    assert len(examples) == (4 if task == "videoqa" else 1)
    for example in examples:
        frames = example.arrays["frames"]
        np.testing.assert_array_equal(frames, pixels[f"test_resized_{size}"][[0, 1, 0, 1]])
        seen = normalize_pixels(jnp.asarray(frames)[None])[0]
        golden = pixels[f"test_normalised_{size}"].transpose(1, 2, 3, 0)[[0, 1, 0, 1]]
        assert_close(seen, golden)
    if task == "caption":
        assert sorted(examples[0].answers) == ["A man!", "a dog"]
        return
    want = words["question_train"]
    for example, ids, mask in zip(examples[:3], want["ids"], want["mask"], strict=True):
        np.testing.assert_array_equal(example.arrays["instruction"][: len(ids)], ids)
        np.testing.assert_array_equal(example.arrays["instruction_mask"][: len(ids)], np.array(mask, bool))
        assert not example.arrays["instruction_mask"][len(ids) :].any()
        assert example.answers == ("Red",)  # as it stands there, to be met to the letter
    assert examples[3].arrays["instruction_mask"].sum() == 1 + 50  # words, where training has 30


def test_a_caption_is_an_example_and_a_question_has_fewer_words_when_learned(data: Path, words: Any) -> None:
    learned = [EvaluationSet(page(task, 28).streams["video"].data, WordPieceTokenizer(words["vocab"]), name="v", seed=0)
               for task in PAGES]  # fmt: skip
    assert [len(each) for each in learned] == [4, 2]
    assert learned[0][3].arrays["instruction_mask"].sum() == 1 + 30


@pytest.mark.parametrize("folder", ["c1_fc", "c1_eq"])
def test_what_is_said_is_what_the_release_generates(folder: str, reference: Path, data: Path) -> None:
    for golden in load_goldens(reference / "goldens" / folder):
        config = page(golden.model, 28)
        tokens = SpecialTokens(begin=golden.settings["bos"], end=golden.settings["eos"], mask=103)
        context = TaskContext(settings=config.tasks, tokens=tokens)
        predict = TASKS[config.evaluations["test"].task].predict
        assert predict is not None
        ids = np.asarray(predict(golden.definition.bind(golden.params), batch_of(golden), context)["ids"])
        best = golden.outputs["beam5_ids"][:, 0]
        np.testing.assert_array_equal(ids[:, : best.shape[1]], np.maximum(best, 0))
        assert not ids[:, best.shape[1] :].any()


def batch_of(golden: Golden) -> dict[str, Any]:
    """The inputs of a golden folder as a batch."""
    inputs = golden.inputs
    return {
        "frames": jnp.asarray(inputs["image"].transpose(0, 2, 3, 4, 1)),
        "instruction": jnp.asarray(inputs["question_ids"], jnp.int32),
        "instruction_mask": jnp.asarray(inputs["question_mask"] > 0),
    } if golden.model == "videoqa" else {"frames": jnp.asarray(inputs["image"].transpose(0, 2, 3, 4, 1))}  # fmt: skip


@pytest.mark.parametrize(("task", "read"), [("videoqa", "answer"), ("caption", "caption")])
def test_what_is_scored_is_what_the_release_reads(task: str, read: str, data: Path, words: Any) -> None:
    evaluation = page(task, 28).evaluations["test"]
    cases = words["decode"]
    ids = np.zeros((len(cases), max(len(case["ids"]) for case in cases)), np.int32)
    for row, case in zip(ids, cases, strict=True):
        row[: len(case["ids"])] = case["ids"]
    right = [case[read] for case in cases]
    told = [right[0].upper(), *right[1:]]  # one differs by its letters' case
    score = TASKS[evaluation.task].score
    assert score is not None
    reader = make_detokenizer(evaluation.data.examples, WordPieceTokenizer(words["vocab"]))
    scored = score({"ids": ids}, [Example({}, str(i), answers=(text,)) for i, text in enumerate(told)], reader)
    assert list(scored.predictions) == right
    if task == "videoqa":
        assert scored.metrics["accuracy"].value == (len(cases) - 1) / len(cases)
        assert not scored.example_scores[0]
    else:
        assert scored.example_scores[0] == pytest.approx(1000)  # the most there is: captions are compared in lower case


@pytest.mark.slow
@pytest.mark.parametrize("task", PAGES)
def test_weights_of_the_release_say_the_same_in_pytorch(
    task: str, reference: Path, data: Path, words: Any, tmp_path: Path
) -> None:
    """From its weights, a page and files to a line of words; and back out, of the same frames, by the other runtime."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed here")
    from mplug2_jax.conversion.torch_runtime import Caption, VideoQA, normalize_pixels

    weights = reference / "goldens" / "c1_fc" / f"{task}_weights.safetensors"
    tokenizer = WordPieceTokenizer(words["vocab"][:200])
    run, out, hub = tmp_path / "official", tmp_path / "out", tmp_path / "hub"
    vocabulary = tokenizer.save(tmp_path / "words")
    known = ["--tokenizer", str(vocabulary), "--task", task]
    assert main(["convert", "import", str(weights), "--to", str(run), *known]) == 0
    fields: dict[str, Any] = {"evaluations.test.data.visual.image_size": 56, "mesh.fsdp": 1, "mesh.data": 8}
    if task == "videoqa":
        fields |= {f"{of}.data.examples.instruction_length": 40 for of in ("streams.video", "evaluations.test")}
    overrides = [f"--config.{field}={value}" for field, value in fields.items()]
    assert main(["eval", "--config", PAGES[task], "--checkpoint", str(run), "--out", str(out), *overrides]) == 0
    said = [json.loads(line)["prediction"] for line in (out / "test.jsonl").read_text().splitlines()]
    assert main(["convert", "export", str(run), "--to", str(hub)]) == 0

    evaluation = page(task, 56).evaluations["test"].data
    held = EvaluationSet(evaluation, tokenizer, name="test", seed=0)
    arrays = [held[i].arrays for i in range(len(held))]
    frames = normalize_pixels(torch.from_numpy(np.stack([each["frames"] for each in arrays])))
    if task == "caption":
        found = Caption.from_pretrained(hub).generate(frames)
    else:
        names = ("instruction", "instruction_mask")
        asked = [torch.from_numpy(np.stack([each[name][:40] for each in arrays])) for name in names]
        found = VideoQA.from_pretrained(hub).generate(frames, *asked)
    read = make_detokenizer(evaluation.examples, tokenizer)
    rows = zip(found.ids[:, 0].tolist(), found.lengths[:, 0].tolist(), strict=True)
    assert said == [read(ids[:length]) for ids, length in rows]
    assert all(said)
