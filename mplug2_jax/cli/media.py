"""What commands take from people: pictures, clips and texts, as files or folders of them."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mplug2_jax.errors import UserError

if TYPE_CHECKING:
    from data_pipelines.config import VisualConfig
    from mplug2_jax.training.config import RunConfig


def files_in(paths: Iterable[Path]) -> Iterator[Path]:
    """The files themselves, and for folders all pictures, clips and .txt files below them, in their order.

    Raises:
        UserError: nothing there.
        DataError: a folder without any.
    """
    from data_pipelines.sources.file_source import list_files

    for path in paths:
        if path.is_dir():
            yield from (path / name for name in list_files(str(path)))
        elif path.is_file():
            yield path
        else:
            raise UserError(f"{path} does not exist or is no file; expected an image, a video or a .txt file")


def visual_of(config: "RunConfig") -> "VisualConfig":
    """How pictures come to a model that a run trained: one frame of an image, as many of a video as it was trained on.

    All of the picture is seen, at the model's size; by the release's rule where the run kept to it.
    """
    from data_pipelines.config import WHITE, VisualConfig

    data = [stream.data for stream in config.streams.values() if stream.data.kind != "text"]
    released = any(each.visual.transform.startswith("released") for each in data)
    return VisualConfig(
        image_size=config.model.image_size,
        num_frames=max((each.visual.num_frames for each in data if each.kind == "video"), default=1),
        background=next((each.visual.background for each in data), WHITE),
        transform="released_test" if released else "resize",
    )
