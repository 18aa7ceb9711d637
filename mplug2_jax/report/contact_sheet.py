"""A batch as a contact sheet: an image, and a self-contained page."""

import base64
import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.augment import apply_color_operations
from data_pipelines.loader import LoadedBatch, LoadedExample
from data_pipelines.media import write_image
from mplug2_jax.errors import UserError
from mplug2_jax.report.rendering import render, write_page

MIN_FRAME, WIDTH, GAP = 96, 1600, 4
"""Pixels: the minimum side of a frame, the width of a sheet, and the gap between examples."""


@dataclasses.dataclass(frozen=True)
class _Cell:
    """One example on the page."""

    row: LoadedExample
    image: str  # a PNG in base64; empty without frames
    times: str  # of the frames


def write_contact_sheet(stem: Path, stream: str, step: int, batch: LoadedBatch) -> list[Path]:
    """Write STEM.html, and STEM.png if the batch has frames; return their paths.

    Raises:
        UserError: a file exists.
    """
    strips = [_strip(row.example.arrays) for row in batch.rows]
    images = [strip for strip in strips if strip is not None]
    paths = [stem.with_name(f"{stem.name}.html")] + [stem.with_name(f"{stem.name}.png")] * bool(images)
    if existing := [path for path in paths if path.exists()]:
        raise UserError(f"{existing[0]} exists; choose another --out")
    cells = [
        _Cell(row, "" if strip is None else _base64(strip), ", ".join(f"{t:.2f}" for t in row.example.times))
        for row, strip in zip(batch.rows, strips, strict=True)
    ]
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_page(paths[0], render("contact_sheet.html", stream=stream, step=step, cells=cells))
    if images:
        write_image(paths[1], _arrange(images))
    return paths


def _strip(arrays: Any) -> UInt8[np.ndarray, "y x 3"] | None:
    """Return the frames of an example side by side, enlarged to at least ``MIN_FRAME``."""
    frames = arrays.get("frames")
    if frames is None:
        return None
    if "color_operations" in arrays:  # the device applies them
        frames = apply_color_operations(frames, arrays["color_operations"])
    scale = max(1, MIN_FRAME // frames.shape[1])
    strip: UInt8[np.ndarray, "y x 3"] = np.concatenate(list(frames), axis=1).repeat(scale, 0).repeat(scale, 1)
    return strip


def _arrange(strips: list[UInt8[np.ndarray, "y x 3"]]) -> UInt8[np.ndarray, "Y X 3"]:
    """Return all strips of a batch, which have one size, in rows."""
    height, width = strips[0].shape[0] + GAP, strips[0].shape[1] + GAP
    columns = max(1, min(WIDTH // width, len(strips)))
    sheet = np.full((-(-len(strips) // columns) * height, columns * width, 3), 255, np.uint8)
    for i, strip in enumerate(strips):
        y, x = i // columns * height, i % columns * width
        sheet[y : y + strip.shape[0], x : x + strip.shape[1]] = strip
    return sheet


def _base64(image: UInt8[np.ndarray, "y x 3"]) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
