"""Images, videos and texts given as files or folders, and how a trained model reads them."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from data_pipelines.config import WHITE, ExampleConfig, VisualConfig
from data_pipelines.sources.file_source import list_files
from mplug2_jax.errors import UserError
from mplug2_jax.training.config import RunConfig


def find_media(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the files, and for folders all images, videos and .txt files below them, in order.

    Raises:
        UserError: no such file.
        DataError: a folder without such files.
    """
    for path in paths:
        if path.is_dir():
            yield from (path / name for name in list_files(str(path)))
        elif path.is_file():
            yield path
        else:
            raise UserError(f"{path} does not exist or is not a file; expected an image, a video or a .txt file")


def visual_config(config: RunConfig) -> VisualConfig:
    """Return how a run's model reads frames: one of an image, of a video as many as in training.

    The whole frame is visible, at the model's size; by the release's transform if the run used it.
    """
    data = [stream.data for stream in config.streams.values() if stream.data.kind != "text"]
    released = any(each.visual.transform.startswith("released") for each in data)
    return VisualConfig(
        image_size=config.model.image_size,
        num_frames=max((each.visual.num_frames for each in data if each.kind == "video"), default=1),
        background=next((each.visual.background for each in data), WHITE),
        transform="released_test" if released else "resize",
    )


def instruction_config(config: RunConfig) -> ExampleConfig:
    """Return how a run's model reads instructions: as in its evaluations, if any, else as in training.

    The release truncates questions more in training.
    """
    configs = [evaluation.data.examples for evaluation in config.evaluations.values()]
    configs += [stream.data.examples for stream in config.streams.values()]
    return next((examples for examples in configs if examples.instructions), ExampleConfig())
