"""What can be said and asked of a scene: captions, questions, expressions, facts, entailments.

All of it in lower case, from about a hundred words, without punctuation but the question mark.
"""

import itertools
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

from data_pipelines.digitworld.scene import COLOURS, DIGITS, DIRECTIONS, PLACES, SIZES, Scene, Thing
from data_pipelines.record import Entailment, Question

NUM_CAPTIONS = 4
EXPRESSIONS_PER_THING = 3

# How often a kind of question comes first, relative to the others a scene has. Rich answers come often and those with
# two values seldom, so that no answer is right for more than a small share of the scenes.
WEIGHTS = {
    "colour": 5.0, "digit": 5.0, "place": 5.0, "motion": 6.0, "action": 3.0, "size": 2.0, "speed": 2.0,
    "existence": 2.0, "count": 1.0,
}  # fmt: skip

Detail = Literal["colour", "size", "place", "motion"]
T = TypeVar("T")


def _pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _pick_many(rng: np.random.Generator, options: Sequence[T], count: int) -> tuple[T, ...]:
    """Different ones, in random order."""
    return tuple(options[i] for i in rng.permutation(len(options))[:count])


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase.startswith("eight") else f"a {phrase}"


def _action(thing: Thing, form: int = 0) -> str:
    """What a thing does, in two wordings."""
    motion = thing.motion
    if motion.kind == "still":
        return ("stays still", "does not move")[form]
    if motion.kind == "appears":
        return ("appears", "shows up")[form]
    return (f"moves {motion.direction} {motion.speed}", f"{motion.speed} moves {motion.direction}")[form]


def _describe(thing: Thing, details: Sequence[Detail], form: int = 0) -> str:
    """A noun phrase or clause with the given details, in two wordings."""
    words = [thing.size] * ("size" in details) + [thing.colour] * ("colour" in details) + [thing.name]
    phrase = _article(" ".join(words))
    if "place" in details:
        phrase += (f" at the {thing.place}", f" in the {thing.place} corner")[form]
    if "motion" in details:
        phrase += f" {_action(thing, form)}"
    return phrase


def captions(scene: Scene, rng: np.random.Generator, *, moving: bool) -> tuple[str, ...]:
    """Wordings of one full description: digits, colours, sizes, and places (or motions in a clip)."""
    openings = ("", "in the clip ") if moving else ("", "there is ", "we see ", "a picture of ")
    joints = (" while ", " and ") if moving else (" and ",)
    orders = tuple(itertools.permutations(scene.things))
    details: tuple[Detail, ...] = ("size", "colour", "motion" if moving else "place")
    wordings = [
        opening + joint.join(_describe(thing, details, form) for thing in order)
        for opening in openings
        for joint in joints[: len(scene.things)]
        for form in (0, 1)
        for order in orders
    ]
    return _pick_many(rng, wordings, NUM_CAPTIONS)


def _reference(thing: Thing, rng: np.random.Generator) -> str:
    return _pick(rng, (f"the {thing.name}", f"the {thing.colour} {thing.name}", f"the {thing.colour} digit"))


def questions(scene: Scene, rng: np.random.Generator, *, moving: bool) -> tuple[Question, ...]:
    """Every question that the scene can answer, in random order with the ``WEIGHTS`` for what comes first."""
    asked = [question for thing in scene.things for question in _about(thing, scene, rng, moving)]
    asked += _existence(scene, rng)
    how_many = _pick(rng, ("how many digits are there?", "how many digits do we see?"))
    asked.append(Question(how_many, DIGITS[len(scene.things)], "count"))
    kinds = [question.kind for question in asked]
    weights = np.array([WEIGHTS[kind] / kinds.count(kind) for kind in kinds])
    # The smallest of exponential variables is the first with a probability in proportion to its rate.
    order = np.argsort(rng.standard_exponential(len(asked)) / weights)
    return tuple(asked[i] for i in order)


def _about(thing: Thing, scene: Scene, rng: np.random.Generator, moving: bool) -> list[Question]:
    """Questions whose answer is one of the thing's properties."""
    name, motion, the_thing = thing.name, thing.motion, _reference(thing, rng)
    known_by = (thing.colour, thing.size) if moving else (thing.colour, thing.size, f"at the {thing.place}")
    where = {"still": f"where is {the_thing}?", "moves": f"where does {the_thing} start?"}
    asked = [
        Question(
            _pick(rng, (f"what color is the {name}?", f"what is the color of the {name}?")), thing.colour, "colour"
        ),
        Question(f"which digit is {_pick(rng, known_by)}?", name, "digit"),
        Question(where.get(motion.kind, f"where does {the_thing} appear?"), thing.place, "place"),
        Question(f"how big is {_reference(thing, rng)}?", thing.size, "size"),
    ]
    if not moving:
        return asked
    if motion.kind != "appears":
        asked.append(Question(f"which way does {the_thing} move?", motion.direction or "nowhere", "motion"))
    if motion.kind == "moves":
        asked.append(Question(f"how fast does {the_thing} move?", motion.speed, "speed"))
    if all(other is thing or other.motion.kind != motion.kind for other in scene.things):
        action = {"still": "stays still", "moves": "moves", "appears": "appears"}[motion.kind]
        asked.append(Question(f"which digit {action}?", name, "action"))
    return asked


def _existence(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One question to affirm and one to deny, the latter wrong in its colour or its digit alone."""
    seen = {(thing.colour, thing.name) for thing in scene.things}
    real = _pick(rng, scene.things)
    near = [(colour, real.name) for colour in COLOURS] + [(real.colour, name) for name in DIGITS]
    absent = _pick(rng, [pair for pair in near if pair not in seen])
    return [
        Question(f"is there a {colour} {name}?", answer, "existence")
        for (colour, name), answer in (((real.colour, real.name), "yes"), (absent, "no"))
    ]


def referring_expressions(thing: Thing, rng: np.random.Generator) -> tuple[str, ...]:
    """Phrases that mean this thing and no other of its scene, at the beginning of a clip."""
    phrases = (
        f"the {thing.colour} {thing.name}",
        f"the {thing.size} {thing.colour} {thing.name}",
        f"the {thing.colour} digit",
        f"the {thing.name}",
        f"the {thing.size} digit",
        f"the digit at the {thing.place}",
    )
    return _pick_many(rng, phrases, EXPRESSIONS_PER_THING)


def sentences(scene: Scene, rng: np.random.Generator, *, moving: bool) -> tuple[str, ...]:
    """One to three sentences on a scene that nobody shows: a caption, then facts."""
    last: Detail = "motion" if moving else "place"
    facts = [
        f"the {thing.name} {_value(thing, detail)}" for thing in scene.things for detail in ("colour", "size", last)
    ]
    if len(scene.things) == 2 and not moving:
        facts += _relations(*scene.things)
    return (captions(scene, rng, moving=moving)[0], *_pick_many(rng, facts, int(rng.integers(3))))


def report(scene: Scene, rng: np.random.Generator, *, moving: bool) -> Question:
    """Every fact of a scene, one after the other in random order, and in answer the one description that holds all."""
    last: Detail = "motion" if moving else "place"
    facts = [f"the {thing.name} is {value}" for thing in scene.things for value in (thing.colour, thing.size)]
    facts += [f"the {thing.name} {_action(thing) if moving else f'is at the {thing.place}'}" for thing in scene.things]
    summary = " and ".join(_describe(thing, ("size", "colour", last)) for thing in scene.things)
    return Question(" ".join(_pick_many(rng, facts, len(facts))), summary, "summary")


def _relations(a: Thing, b: Thing) -> list[str]:
    """How two still things lie to each other."""
    (a_row, a_column), (b_row, b_column) = a.place.split(), b.place.split()
    facts = []
    if a_column != b_column:
        facts.append(f"the {a.name} is {a_column} of the {b.name}")
    if a_row != b_row:
        facts.append(f"the {a.name} is {'above' if a_row == 'top' else 'below'} the {b.name}")
    return facts


def _value(thing: Thing, detail: Detail) -> str:
    """A detail of a thing as the predicate of a sentence."""
    if detail == "motion":
        return f"moves {thing.motion.direction}" if thing.motion.kind == "moves" else _action(thing)
    return f"is {'at the ' if detail == 'place' else ''}{getattr(thing, detail)}"


def entailments(scene: Scene, rng: np.random.Generator, *, moving: bool) -> tuple[Entailment, ...]:
    """A hypothesis that follows, one that is contradicted and one that is left open, in random order."""
    answers: tuple[Literal["yes", "no", "maybe"], ...] = ("yes", "no", "maybe")
    return _pick_many(rng, [_entailment(scene, rng, moving, answer) for answer in answers], 3)


def _entailment(
    scene: Scene, rng: np.random.Generator, moving: bool, answer: Literal["yes", "no", "maybe"]
) -> Entailment:
    """A premise that tells the detail in question, or omits it for all things when the answer is "maybe"."""
    thing = _pick(rng, scene.things)
    told: list[Detail] = ["size", "colour", "motion" if moving else "place"]
    # That something appears neither says nor denies how it moves.
    detail = _pick(rng, told[:2] if thing.motion.kind == "appears" else told)
    told = [other for other in told if other != detail and rng.random() < 0.6]
    if answer != "maybe":
        told.append(detail)
    premise = " and ".join(_describe(thing, told, int(rng.integers(2))) for thing in scene.things)
    truth = _value(thing, detail)
    if answer == "yes" or (answer == "maybe" and rng.random() < 0.5):
        claim = truth
    else:
        claim = _pick(rng, [value for value in _possible_values(detail) if value != truth])
    return Entailment(premise, f"the {thing.name} {claim}", answer)


def _possible_values(detail: Detail) -> list[str]:
    if detail == "motion":
        return ["stays still", *(f"moves {direction}" for direction in DIRECTIONS)]
    values = {"colour": tuple(COLOURS), "size": tuple(SIZES), "place": PLACES}[detail]
    return [f"is {'at the ' if detail == 'place' else ''}{value}" for value in values]
