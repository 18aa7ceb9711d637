"""The annotations of a scene: captions, questions, referring expressions, facts, entailments.

All are in lower case, from a vocabulary of about a hundred words, without punctuation except the question mark.
"""

import itertools
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

from data_pipelines.digitworld.scene import COLOURS, DIGITS, DIRECTIONS, PLACES, SIZES, Scene, Thing
from data_pipelines.record import Entailment, Question

NUM_CAPTIONS = 4
EXPRESSIONS_PER_THING = 3

# Relative frequency of a kind of question as the first of a scene. Questions with many possible answers are frequent,
# binary ones rare, so that no answer is right for more than a small fraction of the scenes.
WEIGHTS = {
    "colour": 5.0, "digit": 5.0, "place": 5.0, "motion": 6.0, "action": 3.0, "size": 2.0, "speed": 2.0,
    "existence": 2.0, "count": 1.0,
}  # fmt: skip

Detail = Literal["colour", "size", "place", "motion"]
T = TypeVar("T")


def _choose(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def _choose_many(rng: np.random.Generator, options: Sequence[T], count: int) -> tuple[T, ...]:
    """Choose distinct options, in random order."""
    return tuple(options[i] for i in rng.permutation(len(options))[:count])


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase.startswith("eight") else f"a {phrase}"


def _action(thing: Thing, wording: int = 0) -> str:
    """Describe the motion of a thing, in one of two wordings."""
    motion = thing.motion
    if motion.kind == "still":
        return ("stays still", "does not move")[wording]
    if motion.kind == "appears":
        return ("appears", "shows up")[wording]
    return (f"moves {motion.direction} {motion.speed}", f"{motion.speed} moves {motion.direction}")[wording]


def _describe(thing: Thing, details: Sequence[Detail], wording: int = 0) -> str:
    """Return a noun phrase or clause with the given details, in one of two wordings."""
    words = [thing.size] * ("size" in details) + [thing.colour] * ("colour" in details) + [thing.name]
    phrase = _article(" ".join(words))
    if "place" in details:
        phrase += (f" at the {thing.place}", f" in the {thing.place} corner")[wording]
    if "motion" in details:
        phrase += f" {_action(thing, wording)}"
    return phrase


def captions(scene: Scene, rng: np.random.Generator, *, moving: bool) -> tuple[str, ...]:
    """Return wordings of one full description: digits, colors, sizes, and places (or motions in a video)."""
    openings = ("", "in the clip ") if moving else ("", "there is ", "we see ", "a picture of ")
    joints = (" while ", " and ") if moving else (" and ",)
    orders = tuple(itertools.permutations(scene.things))
    details: tuple[Detail, ...] = ("size", "colour", "motion" if moving else "place")
    wordings = [
        opening + joint.join(_describe(thing, details, wording) for thing in order)
        for opening in openings
        for joint in joints[: len(scene.things)]
        for wording in (0, 1)
        for order in orders
    ]
    return _choose_many(rng, wordings, NUM_CAPTIONS)


def _reference(thing: Thing, rng: np.random.Generator) -> str:
    return _choose(rng, (f"the {thing.name}", f"the {thing.colour} {thing.name}", f"the {thing.colour} digit"))


def questions(scene: Scene, rng: np.random.Generator, *, moving: bool) -> tuple[Question, ...]:
    """Return all questions that the scene answers, in a random order weighted by ``WEIGHTS``."""
    result = [question for thing in scene.things for question in _property_questions(thing, scene, rng, moving)]
    result += _existence_questions(scene, rng)
    how_many = _choose(rng, ("how many digits are there?", "how many digits do we see?"))
    result.append(Question(how_many, DIGITS[len(scene.things)], "count"))
    kinds = [question.kind for question in result]
    weights = np.array([WEIGHTS[kind] / kinds.count(kind) for kind in kinds])
    # The smallest of exponential variables is each one with a probability proportional to its rate.
    order = np.argsort(rng.standard_exponential(len(result)) / weights)
    return tuple(result[i] for i in order)


def _property_questions(thing: Thing, scene: Scene, rng: np.random.Generator, moving: bool) -> list[Question]:
    """Return questions about the properties of a thing."""
    name, motion, the_thing = thing.name, thing.motion, _reference(thing, rng)
    descriptions = (thing.colour, thing.size) if moving else (thing.colour, thing.size, f"at the {thing.place}")
    where = {"still": f"where is {the_thing}?", "moves": f"where does {the_thing} start?"}
    result = [
        Question(
            _choose(rng, (f"what color is the {name}?", f"what is the color of the {name}?")), thing.colour, "colour"
        ),
        Question(f"which digit is {_choose(rng, descriptions)}?", name, "digit"),
        Question(where.get(motion.kind, f"where does {the_thing} appear?"), thing.place, "place"),
        Question(f"how big is {_reference(thing, rng)}?", thing.size, "size"),
    ]
    if not moving:
        return result
    if motion.kind != "appears":
        result.append(Question(f"which way does {the_thing} move?", motion.direction or "nowhere", "motion"))
    if motion.kind == "moves":
        result.append(Question(f"how fast does {the_thing} move?", motion.speed, "speed"))
    if all(other is thing or other.motion.kind != motion.kind for other in scene.things):
        action = {"still": "stays still", "moves": "moves", "appears": "appears"}[motion.kind]
        result.append(Question(f"which digit {action}?", name, "action"))
    return result


def _existence_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Return a question with the answer "yes", and one with "no" that is wrong only in its color or its digit."""
    present = {(thing.colour, thing.name) for thing in scene.things}
    true = _choose(rng, scene.things)
    similar = [(colour, true.name) for colour in COLOURS] + [(true.colour, name) for name in DIGITS]
    absent = _choose(rng, [pair for pair in similar if pair not in present])
    return [
        Question(f"is there a {colour} {name}?", answer, "existence")
        for (colour, name), answer in (((true.colour, true.name), "yes"), (absent, "no"))
    ]


def referring_expressions(thing: Thing, rng: np.random.Generator) -> tuple[str, ...]:
    """Return phrases that refer to this thing and no other of its scene, at the start of a video."""
    phrases = (
        f"the {thing.colour} {thing.name}", f"the {thing.size} {thing.colour} {thing.name}",
        f"the {thing.colour} digit", f"the {thing.name}", f"the {thing.size} digit", f"the digit at the {thing.place}",
    )  # fmt: skip
    return _choose_many(rng, phrases, EXPRESSIONS_PER_THING)


def sentences(scene: Scene, rng: np.random.Generator, *, moving: bool) -> tuple[str, ...]:
    """Return one to three sentences about a scene: a caption, then facts."""
    last: Detail = "motion" if moving else "place"
    facts = [
        f"the {thing.name} {_value(thing, detail)}" for thing in scene.things for detail in ("colour", "size", last)
    ]
    if len(scene.things) == 2 and not moving:
        facts += _relations(*scene.things)
    return (captions(scene, rng, moving=moving)[0], *_choose_many(rng, facts, int(rng.integers(3))))


def report(scene: Scene, rng: np.random.Generator, *, moving: bool) -> Question:
    """Return all facts of a scene in random order as a question, and their summary as its answer."""
    last: Detail = "motion" if moving else "place"
    facts = [f"the {thing.name} is {value}" for thing in scene.things for value in (thing.colour, thing.size)]
    facts += [f"the {thing.name} {_action(thing) if moving else f'is at the {thing.place}'}" for thing in scene.things]
    summary = " and ".join(_describe(thing, ("size", "colour", last)) for thing in scene.things)
    return Question(" ".join(_choose_many(rng, facts, len(facts))), summary, "summary")


def _relations(a: Thing, b: Thing) -> list[str]:
    """Return the spatial relations of two still things."""
    (a_row, a_column), (b_row, b_column) = a.place.split(), b.place.split()
    facts = []
    if a_column != b_column:
        facts.append(f"the {a.name} is {a_column} of the {b.name}")
    if a_row != b_row:
        facts.append(f"the {a.name} is {'above' if a_row == 'top' else 'below'} the {b.name}")
    return facts


def _value(thing: Thing, detail: Detail) -> str:
    """Return a detail of a thing as the predicate of a sentence."""
    if detail == "motion":
        return f"moves {thing.motion.direction}" if thing.motion.kind == "moves" else _action(thing)
    return f"is {'at the ' if detail == 'place' else ''}{getattr(thing, detail)}"


def entailments(scene: Scene, rng: np.random.Generator, *, moving: bool) -> tuple[Entailment, ...]:
    """Return a hypothesis that follows, one that is contradicted and one that is undecided, in random order."""
    answers: tuple[Literal["yes", "no", "maybe"], ...] = ("yes", "no", "maybe")
    return _choose_many(rng, [_entailment(scene, rng, moving, answer) for answer in answers], 3)


def _entailment(
    scene: Scene, rng: np.random.Generator, moving: bool, answer: Literal["yes", "no", "maybe"]
) -> Entailment:
    """Return a premise with the detail in question, or without it for all things if the answer is "maybe"."""
    thing = _choose(rng, scene.things)
    details: list[Detail] = ["size", "colour", "motion" if moving else "place"]
    # That a thing appears neither entails nor contradicts how it moves.
    detail = _choose(rng, details[:2] if thing.motion.kind == "appears" else details)
    details = [each for each in details if each != detail and rng.random() < 0.6]
    if answer != "maybe":
        details.append(detail)
    premise = " and ".join(_describe(thing, details, int(rng.integers(2))) for thing in scene.things)
    truth = _value(thing, detail)
    if answer == "yes" or (answer == "maybe" and rng.random() < 0.5):
        claim = truth
    else:
        claim = _choose(rng, [value for value in _possible_values(detail) if value != truth])
    return Entailment(premise, f"the {thing.name} {claim}", answer)


def _possible_values(detail: Detail) -> list[str]:
    if detail == "motion":
        return ["stays still", *(f"moves {direction}" for direction in DIRECTIONS)]
    values = {"colour": tuple(COLOURS), "size": tuple(SIZES), "place": PLACES}[detail]
    return [f"is {'at the ' if detail == 'place' else ''}{value}" for value in values]
