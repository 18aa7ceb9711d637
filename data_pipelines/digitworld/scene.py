"""Scenes, and how they are sampled.

A scene is one digit, or two that differ in digit, color, size and place, so that "the red one", "the seven" and "the
large digit" each refer to exactly one thing. Lengths are fractions of the canvas; time is 0 at the first frame of a
video and 1 at its last. A scene is independent of pixels and of the number of frames.
"""

import dataclasses
from typing import Literal

import numpy as np

from data_pipelines.digitworld.digits import Split, glyphs_for

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (240, 45, 40), "green": (40, 205, 70), "blue": (55, 115, 255),
    "yellow": (250, 220, 40), "purple": (205, 70, 235), "white": (245, 245, 245),
}  # fmt: skip
SIZES = {"large": 15 / 32, "small": 10 / 32}  # side of the square that holds the digit
PLACES = ("top left", "top right", "bottom left", "bottom right")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # y points down
SPEEDS = {"slowly": 0.25, "quickly": 0.5}  # distance from the first frame to the last
TINTS = ((10, 10, 14), (10, 12, 36), (8, 28, 20), (34, 14, 16), (26, 12, 34))  # of the background

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Motion:
    """The motion of a thing in a video. ``direction`` and ``speed`` are for "moves" and empty otherwise."""

    kind: Literal["still", "moves", "appears"] = "still"
    direction: str = ""
    speed: str = ""


@dataclasses.dataclass(frozen=True)
class Thing:
    """One digit of a scene."""

    digit: int
    glyph: int  # index of the handwritten sample, see ``digits.glyph_image``
    colour: str
    size: str
    place: str  # the quarter of the canvas that contains it, at time 0
    corner: Point  # upper left corner of its square, at time 0
    motion: Motion = Motion()

    @property
    def name(self) -> str:
        """Return the digit as a word."""
        return DIGITS[self.digit]

    @property
    def side(self) -> float:
        """Return the side of its square."""
        return SIZES[self.size]

    def corner_at(self, time: float) -> Point:
        """Return the upper left corner of its square."""
        if self.motion.kind != "moves":
            return self.corner
        distance = SPEEDS[self.motion.speed] * time
        dx, dy = DIRECTIONS[self.motion.direction]
        return self.corner[0] + dx * distance, self.corner[1] + dy * distance

    def visible_at(self, time: float) -> bool:
        """Return whether it is visible; things that appear do so in the second half of a video."""
        return self.motion.kind != "appears" or time > 0.5


@dataclasses.dataclass(frozen=True)
class Scene:
    """One or two things, the larger first, on a dark background."""

    things: tuple[Thing, ...]
    tint: tuple[int, int, int]
    noise: int  # seed of the background's noise


def sample_scene(rng: np.random.Generator, split: Split, *, moving: bool) -> Scene:
    """Sample a scene; with ``moving``, each of its things stays still, moves or appears.

    Things never overlap in an image, nor in the first and last frames of a video; between them they may cross.
    """
    count = 2 if rng.random() < 0.6 else 1
    sizes = ("large", "small") if count == 2 else (("large", "small")[rng.integers(2)],)
    digits, colours, places = (rng.permutation(n) for n in (len(DIGITS), len(COLOURS), len(PLACES)))
    things = tuple(
        _sample_thing(rng, split, int(digit), tuple(COLOURS)[colour], size, PLACES[place])
        for digit, colour, place, size in zip(digits, colours, places, sizes, strict=False)
    )
    if moving:
        things = _set_in_motion(rng, things)
    return Scene(things, TINTS[rng.integers(len(TINTS))], int(rng.integers(2**31)))


def _sample_thing(rng: np.random.Generator, split: Split, digit: int, colour: str, size: str, place: str) -> Thing:
    glyphs = glyphs_for(digit, split)
    x, y = rng.random(2) * (0.5 - SIZES[size])
    corner = float(x) + 0.5 * place.endswith("right"), float(y) + 0.5 * place.startswith("bottom")
    return Thing(digit, int(glyphs[rng.integers(len(glyphs))]), colour, size, place, corner)


def _set_in_motion(rng: np.random.Generator, things: tuple[Thing, ...]) -> tuple[Thing, ...]:
    while True:
        moving = tuple(dataclasses.replace(thing, motion=_sample_motion(rng, thing.place)) for thing in things)
        # In a scene of two, something is visible in every frame, and no thing ends up behind another.
        if len(moving) == 1 or (_are_disjoint(*moving) and sum(thing.motion.kind == "appears" for thing in moving) < 2):
            return moving


def _sample_motion(rng: np.random.Generator, place: str) -> Motion:
    """Sample a motion: still, appearing, or moving towards another quarter, so that it stays on the canvas."""
    choice = rng.random()
    if choice < 0.15:
        return Motion("still")
    if choice < 0.3:
        return Motion("appears")
    vertical, fast = rng.integers(2, size=2)
    sideways = "left" if place.endswith("right") else "right"
    upright = "up" if place.startswith("bottom") else "down"
    return Motion("moves", upright if vertical else sideways, "quickly" if fast else "slowly")


def _are_disjoint(a: Thing, b: Thing) -> bool:
    """Return whether the two do not overlap in the last frame."""
    (ax, ay), (bx, by) = a.corner_at(1.0), b.corner_at(1.0)
    return ax + a.side <= bx or bx + b.side <= ax or ay + a.side <= by or by + b.side <= ay
