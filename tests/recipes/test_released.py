"""The release's protocol from files to scores equals the release's golden numbers."""

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

RECIPES = {"videoqa": "msrvtt_qa:tiny,released", "caption": "msrvtt_caption:tiny,released"}
LENGTH, FRAMES = 33, 4


@pytest.fixture(scope="module")
def words(reference: Path) -> dict[str, Any]:
    return json.loads((reference / "goldens" / "tokenizer.json").read_text())


@pytest.fixture(scope="module")
def pixels(reference: Path) -> dict[str, np.ndarray]:
    return dict(np.load(reference / "goldens" / "recipe_pixels.npz"))


@pytest.fixture
def data(reference: Path, words: Any, pixels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write MSRVTT in the release's format with one lossless video: golden frames where it samples, noise elsewhere."""
    cases = json.loads((reference / "goldens" / "recipe.json").read_text())["frame_indices"]
    (sampled,) = (case["middle"] for case in cases if (case["vlen"], case["num_frames"]) == (LENGTH, FRAMES))
    height, width = pixels["frames_u8"].shape[1:3]
    frames = np.random.default_rng(0).integers(0, 256, (LENGTH, height, width, 3), np.uint8)
    frames[sampled] = pixels["frames_u8"][[0, 1, 0, 1]]
    clip = tmp_path / "msrvtt" / "videos" / "video7010.avi"
    clip.parent.mkdir(parents=True)
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height, stream.width, stream.pix_fmt = height, width, "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    questions = [f"{text.capitalize()}?" for text in words["question_train"]["texts"]]
    questions.append(" ".join(["red"] * 60))
    rows = {
        "msrvtt_qa": [{"video_id": "video7010", "question": text, "answer": "Red"} for text in questions],
        "msrvtt_caption": [{"video_id": "video7010", "golden_captions": ["A man!", "a dog"]}],
    }
    for name, content in rows.items():
        for part in ("train", "test"):
            path = tmp_path / name / f"{part}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(f"{json.dumps(row)}\n" for row in content))
    monkeypatch.setenv("MPLUG2_DATA", str(tmp_path))
    return tmp_path


def make_config(task: str, size: int) -> RunConfig:
    return build(RunConfig, load_recipe(RECIPES[task], [f"--config.evaluations.test.data.visual.image_size={size}"]))


@pytest.mark.parametrize("size", [28, 48])
@pytest.mark.parametrize("task", RECIPES)
def test_examples_equal_those_of_the_release(task: str, size: int, data: Path, words: Any, pixels: Any) -> None:
    dataset = EvaluationSet(
        make_config(task, size).evaluations["test"].data, WordPieceTokenizer(words["vocab"]), name="test", seed=42
    )
    examples = [dataset[i] for i in range(len(dataset))]
    assert len(examples) == (4 if task == "videoqa" else 1)
    for example in examples:
        frames = example.arrays["frames"]
        np.testing.assert_array_equal(frames, pixels[f"test_resized_{size}"][[0, 1, 0, 1]])
        pixels_in = normalize_pixels(jnp.asarray(frames)[None])[0]
        golden = pixels[f"test_normalised_{size}"].transpose(1, 2, 3, 0)[[0, 1, 0, 1]]
        assert_close(pixels_in, golden)
    if task == "caption":
        assert sorted(examples[0].answers) == ["A man!", "a dog"]
        return
    expected = words["question_train"]
    for example, ids, mask in zip(examples[:3], expected["ids"], expected["mask"], strict=True):
        np.testing.assert_array_equal(example.arrays["instruction"][: len(ids)], ids)
        np.testing.assert_array_equal(example.arrays["instruction_mask"][: len(ids)], np.array(mask, bool))
        assert not example.arrays["instruction_mask"][len(ids) :].any()
        assert example.answers == ("Red",)  # unchanged, because it is compared exactly
    assert examples[3].arrays["instruction_mask"].sum() == 1 + 50  # words; training has 30


def test_each_caption_is_an_example_and_training_questions_are_shorter(data: Path, words: Any) -> None:
    tokenizer = WordPieceTokenizer(words["vocab"])
    datasets = [
        EvaluationSet(make_config(task, 28).streams["video"].data, tokenizer, name="v", seed=0) for task in RECIPES
    ]
    assert [len(each) for each in datasets] == [4, 2]
    assert datasets[0][3].arrays["instruction_mask"].sum() == 1 + 30


@pytest.mark.parametrize("folder", ["c1_fc", "c1_eq"])
def test_predictions_equal_those_of_the_release(folder: str, reference: Path, data: Path) -> None:
    for golden in load_goldens(reference / "goldens" / folder):
        config = make_config(golden.model, 28)
        tokens = SpecialTokens(begin=golden.settings["bos"], end=golden.settings["eos"], mask=103)
        context = TaskContext(config=config.tasks, tokens=tokens)
        predict = TASKS[config.evaluations["test"].task].predict
        assert predict is not None
        ids = np.asarray(predict(golden.model_def.bind(golden.params), make_batch(golden), context)["ids"])
        best = golden.outputs["beam5_ids"][:, 0]
        np.testing.assert_array_equal(ids[:, : best.shape[1]], np.maximum(best, 0))
        assert not ids[:, best.shape[1] :].any()


def make_batch(golden: Golden) -> dict[str, Any]:
    """Return the inputs of a golden folder as a batch."""
    inputs = golden.inputs
    return {
        "frames": jnp.asarray(inputs["image"].transpose(0, 2, 3, 4, 1)),
        "instruction": jnp.asarray(inputs["question_ids"], jnp.int32),
        "instruction_mask": jnp.asarray(inputs["question_mask"] > 0),
    } if golden.model == "videoqa" else {"frames": jnp.asarray(inputs["image"].transpose(0, 2, 3, 4, 1))}  # fmt: skip


@pytest.mark.parametrize(("task", "read"), [("videoqa", "answer"), ("caption", "caption")])
def test_scores_equal_those_of_the_release(task: str, read: str, data: Path, words: Any) -> None:
    evaluation = make_config(task, 28).evaluations["test"]
    cases = words["decode"]
    ids = np.zeros((len(cases), max(len(case["ids"]) for case in cases)), np.int32)
    for row, case in zip(ids, cases, strict=True):
        row[: len(case["ids"])] = case["ids"]
    decoded = [case[read] for case in cases]
    references = [decoded[0].upper(), *decoded[1:]]  # one differs in case
    score = TASKS[evaluation.task].score
    assert score is not None
    reader = make_detokenizer(evaluation.data.examples, WordPieceTokenizer(words["vocab"]))
    scored = score({"ids": ids}, [Example({}, str(i), answers=(text,)) for i, text in enumerate(references)], reader)
    assert list(scored.predictions) == decoded
    if task == "videoqa":
        assert scored.metrics["accuracy"].value == (len(cases) - 1) / len(cases)
        assert not scored.example_scores[0]
    else:
        assert scored.example_scores[0] == pytest.approx(1000)  # the maximum: captions are compared in lower case


@pytest.mark.slow
@pytest.mark.parametrize("task", RECIPES)
def test_released_weights_generate_the_same_text_in_pytorch(
    task: str, reference: Path, data: Path, words: Any, tmp_path: Path
) -> None:
    """Import weights, evaluate them on files, export them, and generate from the same frames in PyTorch."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed here")
    from mplug2_jax.conversion.torch_runtime import Caption, VideoQA, normalize_pixels

    weights = reference / "goldens" / "c1_fc" / f"{task}_weights.safetensors"
    tokenizer = WordPieceTokenizer(words["vocab"][:200])
    run, out, hub = tmp_path / "official", tmp_path / "out", tmp_path / "hub"
    vocabulary = tokenizer.save(tmp_path / "words")
    options = ["--tokenizer", str(vocabulary), "--task", task]
    assert main(["convert", "import", str(weights), "--to", str(run), *options]) == 0
    fields: dict[str, Any] = {"evaluations.test.data.visual.image_size": 56, "mesh.fsdp": 1, "mesh.data": 8}
    if task == "videoqa":
        fields |= {f"{of}.data.examples.instruction_length": 40 for of in ("streams.video", "evaluations.test")}
    overrides = [f"--config.{field}={value}" for field, value in fields.items()]
    assert main(["eval", "--config", RECIPES[task], "--checkpoint", str(run), "--out", str(out), *overrides]) == 0
    predictions = [json.loads(line)["prediction"] for line in (out / "test.jsonl").read_text().splitlines()]
    assert main(["convert", "export", str(run), "--to", str(hub)]) == 0

    evaluation = make_config(task, 56).evaluations["test"].data
    dataset = EvaluationSet(evaluation, tokenizer, name="test", seed=0)
    arrays = [dataset[i].arrays for i in range(len(dataset))]
    frames = normalize_pixels(torch.from_numpy(np.stack([each["frames"] for each in arrays])))
    if task == "caption":
        output = Caption.from_pretrained(hub).generate(frames)
    else:
        names = ("instruction", "instruction_mask")
        instructions = [torch.from_numpy(np.stack([each[name][:40] for each in arrays])) for name in names]
        output = VideoQA.from_pretrained(hub).generate(frames, *instructions)
    read = make_detokenizer(evaluation.examples, tokenizer)
    rows = zip(output.ids[:, 0].tolist(), output.lengths[:, 0].tolist(), strict=True)
    assert predictions == [read(ids[:length]) for ids, length in rows]
    assert all(predictions)
