"""Small runs in work directories, created once, and the command line as a function."""

import contextlib
import dataclasses
import io
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.digitworld import vocabulary_texts
from data_pipelines.media import write_image, write_video
from data_pipelines.tokenizers import train_wordpiece
from mplug2_jax.cli.main import main
from mplug2_jax.config import build, load_recipe
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints
from mplug2_jax.training.checkpoint.metadata import ModelMetadata
from mplug2_jax.training.config import RunConfig, TokenizerConfig
from mplug2_jax.training.loop import data_position, open_streams
from mplug2_jax.training.state import make_run_spec
from mplug2_jax.training.workdir import WorkDir, special_tokens
from tests.runs import small_model, small_run

RECIPE = """
import functools

from ml_collections import ConfigDict

from mplug2_jax.config import load_recipe


def get_config():
    recipe = load_recipe("demo", {overrides})
    recipe.evaluations.more_words = recipe.evaluations.masked_words.copy_and_resolve_references()
    for path, kept in {kept}:
        group = functools.reduce(ConfigDict.__getitem__, path.split("."), recipe)
        for name in set(group.keys()) - set(kept):
            del group[name]
    return recipe
"""
MODEL = {
    "vision_width": 32, "vision_layers": 1, "vision_heads": 2, "image_size": 16, "width": 32, "heads": 2,
    "mlp_width": 64, "universal_layers": 1, "fusion_layers": 1, "decoder_layers": 1, "num_latents": 4,
    "contrastive_width": 8, "vocab_size": 160, "scan_unroll": 1,
}  # fmt: skip


LOG_LINE = re.compile(r"[DI]\d{4} \d\d:\d\d:\d\d p\d+\] (.*\n)")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Exit status and output of a command; of standard error the DEBUG and INFO messages are in ``log``."""

    status: int
    out: str
    err: str
    log: str = dataclasses.field(default="", compare=False)

    @classmethod
    def split(cls, status: int, out: str, err: str) -> "Outcome":
        """Return the outcome of a process, with the log separated from the rest of standard error."""
        return cls(status, out, LOG_LINE.sub("", err), "".join(LOG_LINE.findall(err)))


def mplug2(*words: object) -> Outcome:
    """Run ``mplug2 WORDS``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Outcome.split(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="package")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a vocab.txt of at most 160 tokens."""
    return train_wordpiece(vocabulary_texts(60), 160).save(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="package")
def recipes(tmp_path_factory: pytest.TempPathFactory, vocabulary: Path) -> Path:
    """Return a folder with two tiny variants of the demo: text.py masks words, pictures.py answers about clips."""
    folder = tmp_path_factory.mktemp("recipes")
    common = {f"model.{name}": value for name, value in MODEL.items()}
    common |= {"tokenizer.path": vocabulary, "steps": 2, "log_every": 1}
    text = {
        "streams.text.data.batch_size": 8, "evaluations.masked_words.data.batch_size": 8,
        "evaluations.masked_words.data.sources.digits.max_records": 11, "evaluations.masked_words.num_samples": 2,
    }  # fmt: skip
    pictures = {
        "streams.video_text.data.batch_size": 8, "streams.video_text.data.visual.num_frames": 2,
        "streams.video_text.data.visual.image_size": 16,
    }  # fmt: skip
    for name, stream, objective, evaluations, values in (
        ("text", "text", "mlm", ["masked_words", "more_words"], text),
        ("pictures", "video_text", "ilm", [], pictures),
    ):
        overrides = [f"--config.{field}={value}" for field, value in (common | values).items()]
        kept = [("streams", [stream]), (f"streams.{stream}.objectives", [objective]), ("evaluations", evaluations)]
        (folder / f"{name}.py").write_text(RECIPE.format(overrides=overrides, kept=kept), encoding="utf-8")
    return folder


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A finished run, and the outcome of its training."""

    workdir: Path
    recipe: Path
    outcome: Outcome


@pytest.fixture(scope="package")
def trained(tmp_path_factory: pytest.TempPathFactory, recipes: Path) -> TrainedRun:
    """Return a text model that was trained for two steps. Tests that change the folder copy it."""
    workdir, recipe = tmp_path_factory.mktemp("runs") / "text", recipes / "text.py"
    return TrainedRun(workdir, recipe, mplug2("train", "--config", recipe, "--workdir", workdir))


@pytest.fixture
def workdir(trained: TrainedRun, tmp_path: Path) -> Path:
    """Return a copy of the trained run's work directory."""
    return shutil.copytree(trained.workdir, tmp_path / "run")


def save_random_run(path: Path, config: RunConfig, scale: float = 0.1, *, biases: bool = True) -> Path:
    """Return the work directory of a run with random parameters, but with zeros for biases without ``biases``."""
    rng, workdir = np.random.default_rng(0), WorkDir(path)
    tokenizer = workdir.load_tokenizer(config)
    workdir.initialize(config, tokenizer)
    spec = make_run_spec(config, special_tokens(tokenizer), make_mesh(config.mesh))

    def draw(place: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        factor = scale if biases or jax.tree_util.keystr(place[-1:], simple=True) != "bias" else 0.0
        return jax.device_put(factor * rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)

    state = jax.tree_util.tree_map_with_path(draw, spec.shapes)
    model = ModelMetadata(config.model, spec.model_def.parts)
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint, model=model)
    checkpoints.save(state, data_position(1, open_streams(config, tokenizer)))
    checkpoints.close()
    return path


@pytest.fixture(scope="package")
def pictures(tmp_path_factory: pytest.TempPathFactory, recipes: Path) -> Path:
    """Return the work directory of a model with a vision tower."""
    config = build(RunConfig, load_recipe(str(recipes / "pictures.py")))
    return save_random_run(tmp_path_factory.mktemp("runs") / "pictures", config)


@pytest.fixture(scope="package")
def contrastive_run(tmp_path_factory: pytest.TempPathFactory, vocabulary: Path) -> Path:
    """Return the work directory of a model that compares images and clips with texts, and gives various answers."""
    streams = small_run().streams
    pairs = {
        name: dataclasses.replace(streams[name], objectives={"vlc": 1.0, "ilm": 1.0})
        for name in ("image_text", "video_text")
    }
    # With one universal layer fewer, its searches would give the same answer to everything.
    config = small_run(
        streams=pairs, evaluations={}, tokenizer=TokenizerConfig(path=str(vocabulary)),
        model=small_model(universal_layers=2),
    )  # fmt: skip
    return save_random_run(tmp_path_factory.mktemp("runs") / "contrastive_run", config, scale=1.0)


@pytest.fixture(scope="package")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an image, a video, a GIF and a text: a.png, a.mp4, a.gif, a.txt."""
    folder = tmp_path_factory.mktemp("media")
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    write_image(folder / "a.png", frames[0])
    write_video(folder / "a.mp4", frames)
    first, *rest = map(Image.fromarray, frames)
    first.save(folder / "a.gif", save_all=True, append_images=rest, duration=100)
    (folder / "a.txt").write_text("a red digit", encoding="utf-8")
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder by its path, empty for a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in paths}
