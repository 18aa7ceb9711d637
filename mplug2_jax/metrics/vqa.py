"""VQA v2's soft accuracy: an answer counts by how many of a question's ten annotators gave it.

After the dataset authors' evaluation, github.com/GT-Vision-Lab/VQA (commit a013f00), quirks included: figures are
comparable only if the texts are.
"""

import re
from collections.abc import Sequence

import numpy as np

from mplug2_jax.metrics.metric import MeanMetric
from mplug2_jax.metrics.validation import check_same_length

ENOUGH = 3  # others who gave an answer make it right

# A word written without its apostrophe, or without one of its several, gets it back; not all words (she'd: shed).
# "somebody'd" is the wrong way round in the original, so it is here.
_WITH_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[: apostrophe.start()] + word[apostrophe.end() :]: word
    for word in _WITH_APOSTROPHES.split()
    for apostrophe in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(i) for i, word in enumerate(_NUMBERS)} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# What stands before a full stop does not matter, though it was meant to: "5." loses it, "v.2" keeps it.
_FULL_STOP = re.compile(r"\.(?!\d)")
_FULL_STOPS = 32  # the most that are removed: a flag, given where the count goes


def normalize_answer(answer: str) -> str:
    """An answer as it is compared: punctuation first, then words, in lower case and with one space between.

    A mark is removed where it stands beside a space anywhere in the answer, and all marks are where a comma stands
    between digits; else it becomes a space.
    """
    spaceless, text = _COMMA_IN_NUMBER.search(answer) is not None, answer
    for mark in PUNCTUATION:
        removed = spaceless or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if removed else " ")
    text = _FULL_STOP.sub("", text, count=_FULL_STOPS)
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(said: str, answers: Sequence[str]) -> float:
    """The mean, each annotator left out once, of min(1, others who agree / 3).

    Where all annotators wrote the same, nothing is normalised, what was said neither: such answers are often read off
    the picture.
    """
    said, *answers = (text.replace("\n", " ").replace("\t", " ").strip() for text in (said, *answers))
    if len(set(answers)) > 1:
        said, *answers = (normalize_answer(text) for text in (said, *answers))
    agree = [answer == said for answer in answers]
    return sum(min(1.0, (sum(agree) - own) / ENOUGH) for own in agree) / max(len(agree), 1)


def vqa_accuracy(said: Sequence[str], answers: Sequence[Sequence[str]]) -> MeanMetric:
    """VQA v2's accuracy; each question has the answers of all its annotators, the same one as often as it was given.

    Blank answers are answers. Questions with too few for anything to be right weigh nothing.

    Raises:
        UserError: not one answer said to each question.
    """
    check_same_length("VQA accuracy", answers=len(said), questions=len(answers))
    weights = np.asarray([float(len(given) > ENOUGH) for given in answers])
    return MeanMetric(weights * [soft_accuracy(*pair) for pair in zip(said, answers, strict=True)], weights)
