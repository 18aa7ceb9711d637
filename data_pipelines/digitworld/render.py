"""Rendering of scenes, and the bounding boxes of their things."""

import functools

import numpy as np
from jaxtyping import Float, UInt8

from data_pipelines.digitworld.digits import glyph_image
from data_pipelines.digitworld.scene import COLOURS, Scene, Thing
from data_pipelines.record import Box

NOISE_LEVELS = 10  # gray levels of the background's noise


def render(scene: Scene, size: int, num_frames: int) -> UInt8[np.ndarray, "t y x 3"]:
    """Render ``num_frames`` square frames of side ``size``; a single frame shows the scene at time 0."""
    noise = np.random.default_rng(scene.noise).integers(0, NOISE_LEVELS, (size, size, 1), np.uint8)
    frames = np.repeat((np.array(scene.tint, np.uint8) + noise)[None], num_frames, axis=0)
    for t, frame in enumerate(frames):
        time = t / max(num_frames - 1, 1)
        for thing in scene.things:  # the larger first, so that a smaller one stays visible when they cross
            if thing.visible_at(time):
                _paint(frame, thing, time)
    return frames


def bounding_box(thing: Thing, size: int) -> Box:
    """Return the bounding box of a thing in the first frame: x0, y0, x1, y1 in 0..1 of the canvas."""
    x, y, side = _square(thing, size, 0.0)
    ink = _stencil(thing.glyph, side) > 0
    columns, rows = np.flatnonzero(ink.any(0)), np.flatnonzero(ink.any(1))
    return (
        float(x + columns[0]) / size, float(y + rows[0]) / size,
        float(x + columns[-1] + 1) / size, float(y + rows[-1] + 1) / size,
    )  # fmt: skip


def _square(thing: Thing, size: int, time: float) -> tuple[int, int, int]:
    """Return x, y and side of a thing's square in pixels, rounded down, so that disjoint squares stay disjoint."""
    x, y = thing.corner_at(time)
    return int(x * size), int(y * size), int(thing.side * size)


def _paint(frame: UInt8[np.ndarray, "y x 3"], thing: Thing, time: float) -> None:
    x, y, side = _square(thing, len(frame), time)
    background = frame[y : y + side, x : x + side]
    opacity = _stencil(thing.glyph, side)[..., None]
    background[...] = background + (np.array(COLOURS[thing.colour], np.float32) - background) * opacity


@functools.lru_cache(maxsize=4096)
def _stencil(glyph: int, side: int) -> Float[np.ndarray, "side side"]:
    """Return the opacity 0..1 of an upscaled glyph; increased contrast sharpens the interpolation."""
    upscale = _interpolation(side)
    ink: Float[np.ndarray, "side side"] = upscale @ glyph_image(glyph) @ upscale.T
    return np.clip((ink - 0.3) / 0.45, 0.0, 1.0)


@functools.lru_cache(maxsize=16)
def _interpolation(side: int) -> Float[np.ndarray, "side 8"]:
    """Return the weights of linear interpolation from 8 pixels to ``side``."""
    position = np.clip((np.arange(side) + 0.5) * 8 / side - 0.5, 0.0, 7.0)
    return np.maximum(1.0 - np.abs(position[:, None] - np.arange(8)), 0.0).astype(np.float32)
