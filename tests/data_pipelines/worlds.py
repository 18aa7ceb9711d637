"""DigitWorld records in public formats: encoded images and videos, tars."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipelines.config import Format, Kind, SourceConfig, VisualConfig
from data_pipelines.digitworld.source import DigitWorld
from data_pipelines.preparation.convert import encode_frames
from data_pipelines.record import Record, Source
from data_pipelines.sources.formats import open_source
from data_pipelines.sources.webdataset import WebDatasetSource

SIZE = 16


def records(kind: str, count: int) -> list[Record]:
    world = DigitWorld(kind, size=count, image_size=SIZE, num_frames=4)
    return [world[i] for i in range(count)]


def encode_media(record: Record) -> bytes:
    """Encode the frames of a record: an image as PNG, a video as mp4."""
    assert record.frames is not None
    data = encode_frames(record.frames, record.key).data
    assert isinstance(data, bytes)
    return data


def tar_of(*members: tuple[str, bytes | str], format: int = tarfile.GNU_FORMAT) -> bytes:
    """Return a tar, possibly with duplicate members."""
    with tarfile.open(fileobj=(packed := io.BytesIO()), mode="w", format=format) as tar:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes | str]) -> Path:
    path.write_bytes(tar_of(*members.items(), format=tarfile.DEFAULT_FORMAT))
    return path


def open_annotations(format: Format, path: Path, **settings: Any) -> Source:
    return open_source(SourceConfig(format=format, path=str(path), **settings), VisualConfig())


def img2dataset(path: Path, count: int = 6, start: int = 0) -> list[Record]:
    """Write a tar as img2dataset does, with 000000000.png, .txt and .json of each sample; return the records."""
    written = records("image", start + count)[start:]
    members: dict[str, bytes | str] = {}
    for i, record in enumerate(written, start):
        fields = {
            "caption": record.captions[0], "url": "https://example.org/x.png", "key": f"{i:09}", "status": "success"
        }  # fmt: skip
        members |= {
            f"{i:09}.png": encode_media(record), f"{i:09}.txt": record.captions[0], f"{i:09}.json": json.dumps(fields)
        }  # fmt: skip
    write_tar(path, members)
    return written


def keys_of(path: Path | str, index: Path | str = "", kind: Kind = "image") -> list[str]:
    """Return the keys of all samples of tars."""
    source = WebDatasetSource(str(path), kind, str(index))
    return [source[i].key for i in range(len(source))]


def png(name: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), name).save(file, "PNG")
    return file.getvalue()
