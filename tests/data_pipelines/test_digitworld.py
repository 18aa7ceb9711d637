"""DigitWorld: annotations match the pixels, and are deterministic."""

import collections
import dataclasses
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.digitworld import IMAGE_LABELS, VIDEO_LABELS, DigitWorld, Scene, Thing, vocabulary_texts
from data_pipelines.digitworld.digits import glyphs_for
from data_pipelines.digitworld.render import bounding_box, render
from data_pipelines.digitworld.scene import COLOURS, DIGITS, PLACES
from data_pipelines.errors import DataError
from data_pipelines.record import Record

kinds = st.sampled_from(["image", "video", "text"])
splits = st.sampled_from(["train", "heldout"])
indices = st.integers(0, 99_999)
few = settings(max_examples=50)


def equal(a: Record, b: Record) -> bool:
    if a.frames is None or b.frames is None:
        return a == b
    return np.array_equal(a.frames, b.frames) and dataclasses.replace(a, frames=None) == dataclasses.replace(
        b, frames=None
    )


def ink(scene: Scene, thing: Thing, size: int, num_frames: int) -> np.ndarray:
    """Return where only this thing changes the background, bool [t, y, x]."""
    alone, empty = dataclasses.replace(scene, things=(thing,)), dataclasses.replace(scene, things=())
    return (render(alone, size, num_frames) != render(empty, size, num_frames)).any(-1)


# --- records as a function of their index


@few
@given(
    kind=kinds, split=splits, seed=st.integers(0, 2**40), index=indices, size=st.integers(16, 64), t=st.integers(2, 9)
)
def test_records_are_a_function_of_their_index(kind, split, seed, index, size, t) -> None:
    def make() -> DigitWorld:
        return DigitWorld(kind, split=split, seed=seed, image_size=size, num_frames=t)

    record = make()[index]
    assert equal(record, make()[index])
    assert equal(record, pickle.loads(pickle.dumps(make()))[np.int64(index)])  # noqa: S301
    assert record.key == f"digitworld/{kind}/{split}/{seed}/{index}"
    if kind == "text":
        assert record.frames is None
    else:
        assert record.frames.shape == (t if kind == "video" else 1, size, size, 3)
        assert record.frames.dtype == np.uint8


@few
@given(kind=kinds, index=indices, other=indices, seed=st.integers(0, 9))
def test_different_records_differ(kind, index, other, seed) -> None:
    world = DigitWorld(kind, seed=seed)
    scenes = [world.scene(index), DigitWorld(kind, seed=seed + 1).scene(index)]
    scenes += [DigitWorld(kind, split="heldout", seed=seed).scene(index)]
    scenes += [world.scene(other)] if other != index else []
    assert len({(scene.noise, scene.things) for scene in scenes}) == len(scenes)


@few
@given(kind=kinds, index=indices)
def test_scenes_and_texts_do_not_depend_on_the_resolution(kind, index) -> None:
    small, large = DigitWorld(kind), DigitWorld(kind, image_size=64, num_frames=8)
    assert small.scene(index) == large.scene(index)
    a, b = small[index], large[index]
    assert (a.captions, a.questions, a.label, a.texts) == (b.captions, b.questions, b.label, b.texts)
    assert [e.text for e in a.expressions] == [e.text for e in b.expressions]


def test_the_first_and_last_index() -> None:
    world = DigitWorld(size=3)
    assert len(world) == 3
    assert world[2].key.endswith("/2")
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"record {index} of a DigitWorld of 3"):
            world[index]


@pytest.mark.parametrize(
    "arguments",
    [
        {"kind": "audio"}, {"split": "test"}, {"seed": -1}, {"size": 0}, {"image_size": 8},
        {"kind": "video", "num_frames": 1},
    ],
)  # fmt: skip
def test_arguments_out_of_range(arguments) -> None:
    name, value = list(arguments.items())[-1]
    with pytest.raises(DataError, match=f"DigitWorld's {name} is {value!r}, expected"):
        DigitWorld(**arguments)


def test_held_out_handwriting_is_disjoint_and_a_fifth() -> None:
    for digit in range(10):
        train, heldout = set(glyphs_for(digit, "train")), set(glyphs_for(digit, "heldout"))
        assert not train & heldout
        assert len(heldout) == (len(train) + len(heldout)) // 5
    for split in ("train", "heldout"):
        world = DigitWorld(split=split)
        for index in range(200):
            for thing in world.scene(index).things:
                assert thing.glyph in glyphs_for(thing.digit, split)


# --- pixels


@few
@given(kind=st.sampled_from(["image", "video"]), index=indices, size=st.integers(16, 100), t=st.integers(2, 9))
def test_things_are_distinct_and_disjoint(kind, index, size, t) -> None:
    scene = DigitWorld(kind).scene(index)
    if len(scene.things) == 1:
        return
    a, b = scene.things
    assert all(getattr(a, name) != getattr(b, name) for name in ("digit", "colour", "size", "place"))
    assert a.size == "large"
    images = t if kind == "video" else 1
    both = ink(scene, a, size, images) & ink(scene, b, size, images)
    assert not both[[0, -1]].any()


def test_videos_of_two_things_are_never_empty() -> None:
    scenes = [DigitWorld("video").scene(index) for index in range(1000)]
    assert all(any(thing.visible_at(0.0) for thing in scene.things) for scene in scenes if len(scene.things) == 2)


@few
@given(index=indices, t=st.integers(3, 9))
def test_the_smaller_thing_is_in_front(index, t) -> None:
    scene = DigitWorld("video").scene(index)
    smaller, colour = scene.things[-1], COLOURS[scene.things[-1].colour]
    alone = render(dataclasses.replace(scene, things=(smaller,)), 32, t)
    solid = (alone == colour).all(-1)
    assert solid.any()
    assert (render(scene, 32, t)[solid] == colour).all()


@few
@given(kind=st.sampled_from(["image", "video"]), split=splits, index=indices, size=st.integers(16, 100))
def test_boxes_hold_the_pixels_tightly(kind, split, index, size) -> None:
    world = DigitWorld(kind, split=split, image_size=size)
    scene, first = world.scene(index), world[index].frames[0]
    background = render(dataclasses.replace(scene, things=()), size, 1)[0]
    changed = (first != background).any(-1)
    for thing in scene.things:
        if not thing.visible_at(0.0):
            continue
        x0, y0, x1, y1 = np.rint(np.array(bounding_box(thing, size)) * size).astype(int)
        mine = changed[y0:y1, x0:x1]
        # The faintest rim of a stroke may be too weak to change a pixel.
        assert mine[:2].any()
        assert mine[-2:].any()
        assert mine[:, :2].any()
        assert mine[:, -2:].any()
        brightest = first[y0:y1, x0:x1].reshape(-1, 3)[first[y0:y1, x0:x1].sum(-1).argmax()].astype(int)
        distance = {name: abs(brightest - rgb).sum() for name, rgb in COLOURS.items()}
        assert min(distance, key=distance.get) == thing.colour
        horizontal, vertical = (x0 + x1) / 2 / size, (y0 + y1) / 2 / size
        assert thing.place == f"{'bottom' if vertical > 0.5 else 'top'} {'right' if horizontal > 0.5 else 'left'}"
        mine[...] = False
    assert not changed.any()
    assert background.max() < 64


@settings(max_examples=100)
@given(index=indices, size=st.sampled_from([32, 48, 64]), t=st.integers(2, 12))
def test_motion_is_visible_and_stays_on_the_canvas(index, size, t) -> None:
    scene = DigitWorld("video").scene(index)
    for thing in scene.things:
        frames_seen = ink(scene, thing, size, t)
        pixels = frames_seen.sum((1, 2))
        if thing.motion.kind == "appears":
            assert not pixels[: t // 2].any()
            assert pixels[(t + 1) // 2 :].all()
            continue
        assert pixels.min() > 0.9 * pixels.max()
        centres = np.array([np.argwhere(frame).mean(0)[::-1] for frame in frames_seen]) / size
        dx, dy = centres[-1] - centres[0]
        steps = np.abs(np.diff(centres, axis=0)).max(-1)
        if thing.motion.kind == "still":
            assert max(abs(dx), abs(dy)) < 1e-9
            continue
        direction = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("up" if dy < 0 else "down")
        assert direction == thing.motion.direction
        assert min(abs(dx), abs(dy)) < 0.02
        assert max(abs(dx), abs(dy)) == pytest.approx({"slowly": 0.25, "quickly": 0.5}[thing.motion.speed], abs=0.06)
        assert steps.max() - steps.min() < 2.5 / size


# --- words


def all_texts(record: Record) -> list[str]:
    return [
        *record.captions, *record.texts, *(e.text for e in record.expressions),
        *(text for q in record.questions for text in (q.question, q.answer)),
        *(text for e in record.entailments for text in (e.premise, e.hypothesis, e.answer)),
    ]  # fmt: skip


def test_the_vocabulary_is_small_and_closed() -> None:
    known = {word for text in vocabulary_texts(1000) for word in re.findall(r"[a-z]+|\S", text)}
    assert len(known) < 150
    for kind in ("image", "video", "text"):
        world = DigitWorld(kind, split="heldout", seed=7)
        for index in range(300):
            for text in all_texts(world[index]):
                assert re.fullmatch(r"[a-z]+( [a-z]+)*\??", text)
                assert set(text.removesuffix("?").split()) <= known


def facts_in(clause: str) -> dict[str, str]:
    """Parse the facts of a clause, independently of the code that wrote it."""
    moves = ("left", "right", "up", "down") if "moves" in clause else ()
    possible = {
        "digit": DIGITS, "colour": COLOURS, "size": ("large", "small"), "place": PLACES,
        "motion": moves, "speed": ("slowly", "quickly"),
    }  # fmt: skip
    facts = {name: value for name, values in possible.items() for value in values if re.search(rf"\b{value}\b", clause)}
    if re.search("stays still|does not move", clause):
        facts["motion"] = "still"
    if re.search("appears|shows up", clause):
        facts["motion"] = "appears"
    return facts


def facts_of(thing: Thing) -> dict[str, str]:
    motion = thing.motion
    facts = {"digit": thing.name, "colour": thing.colour, "size": thing.size, "place": thing.place}
    facts["motion"] = motion.direction or motion.kind
    return facts | ({"speed": motion.speed} if motion.speed else {})


def clauses(text: str) -> list[str]:
    return re.split(" and | while ", text)


@pytest.mark.parametrize("kind", ["image", "video"])
def test_captions_describe_everything_and_nothing_else(kind) -> None:
    world = DigitWorld(kind)
    for index in range(300):
        scene, captions = world.scene(index), world[index].captions
        assert len(set(captions)) == len(captions) >= 3
        drop = {"motion"} if kind == "image" else {"place"}
        want = [{k: v for k, v in facts_of(thing).items() if k not in drop} for thing in scene.things]
        for caption in captions:
            details = [facts_in(clause) for clause in clauses(caption)]
            assert len(details) == len(want)
            assert all(facts in want for facts in details)


def matching(phrase: str, scene: Scene) -> list[Thing]:
    """Return the things with all properties in a phrase; whole words only."""
    words = set(phrase.removesuffix("?").split())
    chosen = list(scene.things)
    for name, values in (("name", DIGITS), ("colour", COLOURS), ("size", ("large", "small"))):
        chosen = [thing for thing in chosen if all(getattr(thing, name) == v for v in words & set(values))]
    return [thing for thing in chosen if all(thing.place == p for p in PLACES if p in phrase)]


@pytest.mark.parametrize("kind", ["image", "video"])
def test_expressions_refer_to_one_thing_with_its_box(kind) -> None:
    world = DigitWorld(kind)
    for index in range(300):
        scene, record = world.scene(index), world[index]
        visible = [thing for thing in scene.things if thing.visible_at(0.0)]
        assert len(record.expressions) == 3 * len(visible)
        for expression in record.expressions:
            (thing,) = matching(expression.text, scene)
            assert expression.box == bounding_box(thing, 32)


def answer(question: str, scene: Scene) -> str:
    """Answer a question from the scene."""
    subject = matching(question, scene)
    if question.startswith("is there a"):
        return "yes" if subject else "no"
    if question.startswith("how many digits"):
        return ["one", "two"][len(scene.things) - 1]
    if action := re.fullmatch(r"which digit (appears|moves|stays still)\?", question):
        subject = [t for t in scene.things if t.motion.kind == action[1].removeprefix("stays ")]
    (thing,) = subject
    facts = facts_of(thing)
    if "start?" in question:
        assert thing.motion.kind == "moves"
    if question.endswith("appear?"):
        assert thing.motion.kind == "appears"
    attribute = {
        "which digit": "digit", "what color is": "colour", "what is the color of": "colour", "where": "place",
        "how big is": "size", "which way does": "motion", "how fast does": "speed",
    }  # fmt: skip
    (name,) = (name for start, name in attribute.items() if question.startswith(start))
    return "nowhere" if facts[name] == "still" else facts[name]


@pytest.mark.parametrize("kind", ["image", "video"])
@few
@given(seed=st.integers(0, 1000), split=splits, index=indices)
def test_answers_are_right(kind, seed, split, index) -> None:
    world = DigitWorld(kind, seed=seed, split=split)
    scene, questions = world.scene(index), world[index].questions
    assert len({q.question for q in questions}) == len(questions)
    for question in questions:
        assert question.answer == answer(question.question, scene), question


@pytest.mark.parametrize("kind", ["image", "video"])
def test_no_answer_is_right_for_many_scenes(kind) -> None:
    world = DigitWorld(kind)
    first = [world[index].questions[0] for index in range(2000)]
    assert max(collections.Counter(q.answer for q in first).values()) / len(first) < 0.15
    per_kind = collections.defaultdict(collections.Counter)
    for question in first:
        per_kind[question.kind][question.answer] += 1
    assert set(per_kind) >= {"colour", "digit", "place", "size", "existence", "count"}
    assert (set(per_kind) >= {"motion", "speed", "action"}) == (kind == "video")
    for answers in per_kind.values():  # blind guessing does not help within a kind either
        assert max(answers.values()) / answers.total() < 0.5 * (1 + 1 / len(answers))


@pytest.mark.parametrize(("kind", "labels"), [("image", IMAGE_LABELS), ("video", VIDEO_LABELS)])
def test_labels_are_the_largest_digit_and_its_motion(kind, labels) -> None:
    world = DigitWorld(kind)
    counts = collections.Counter()
    for index in range(500):
        largest = min(world.scene(index).things, key=lambda thing: thing.size)  # "large" < "small"
        doing = facts_of(largest)["motion"]
        want = largest.name if kind == "image" else doing if doing in ("still", "appears") else f"moving {doing}"
        assert world[index].label == want
        counts[want] += 1
    assert set(counts) == set(labels)
    assert min(counts.values()) > 0.5 * 500 / len(labels)


def test_sentences_are_true() -> None:
    world = DigitWorld("text")
    for index in range(400):
        scene, texts = world.scene(index), world[index].texts
        assert 1 <= len(texts) <= 3
        by_name = {thing.name: thing for thing in scene.things}
        for text in texts:
            if relation := re.fullmatch(r"the (\w+) is (left of|right of|above|below) the (\w+)", text):
                (ax, ay), (bx, by) = (by_name[relation[i]].corner for i in (1, 3))
                assert {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}[relation[2]]
                continue
            for clause in clauses(text):
                details = facts_in(clause)
                assert details.items() <= facts_of(by_name[details["digit"]]).items()


def test_entailments_follow_from_the_premise_only() -> None:
    world = DigitWorld("text")
    first = collections.Counter()
    for index in range(600):
        entailments = world[index].entailments
        assert sorted(e.answer for e in entailments) == ["maybe", "no", "yes"]
        first[entailments[0].answer] += 1
        for entailment in entailments:
            premise = [facts_in(clause) for clause in clauses(entailment.premise)]
            claim = facts_in(entailment.hypothesis)
            ((name, value),) = ((k, v) for k, v in claim.items() if k != "digit")
            (details,) = (facts for facts in premise if facts["digit"] == claim["digit"])
            if name in details:
                assert entailment.answer == ("yes" if details[name] == value else "no")
            else:
                assert entailment.answer == "maybe"
                assert not any(name in facts for facts in premise)
    assert min(first.values()) > 150


def test_a_report_has_every_fact_once_and_its_summary_all_facts() -> None:
    world = DigitWorld("text")
    for index in range(200):
        (question,) = world[index].questions
        details = re.findall(
            r"the (\w+) (.+?)(?= the (?:zero|one|two|three|four|five|six|seven|eight|nine) |$)", question.question
        )
        things = world.scene(index).things
        assert len(details) == 3 * len(things) == len(set(details))
        summary = {facts["digit"]: facts for facts in map(facts_in, clauses(question.answer))}
        assert set(summary) == {thing.name for thing in things} == {name for name, _ in details}
        for thing in things:
            assert summary[thing.name].items() <= facts_of(thing).items()
            assert {"colour", "size"} < set(summary[thing.name])
