"""VQA v2's soft accuracy: an answer scores by how many of a question's ten annotators gave it.

Follows the evaluation of the data set's authors, github.com/GT-Vision-Lab/VQA (commit a013f00), with all its quirks:
scores are comparable only if texts are normalized alike.
"""

import re
from collections.abc import Sequence

import numpy as np

from mplug2_jax.metrics.metric import MeanMetric
from mplug2_jax.metrics.validation import check_same_length

MIN_AGREEING = 3  # annotators besides the one left out, for an answer to score 1

# Apostrophes that are missing from these words are restored; ambiguous ones are not listed (she'd: shed).
# "somebody'd" is reversed in the original, and so it is here.
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
# The original meant to look at what precedes a period, and does not: "5." loses it, "v.2" keeps it.
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # that are removed: the original passes a regex flag as the count


def normalize_answer(answer: str) -> str:
    """Return an answer as it is compared: first punctuation, then words are normalized; lower case, single spaces.

    A punctuation mark is removed if it is next to a space anywhere in the answer, and all marks are removed if a comma
    is between digits; else a mark becomes a space.
    """
    remove_all, text = _COMMA_IN_NUMBER.search(answer) is not None, answer
    for mark in PUNCTUATION:
        remove = remove_all or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if remove else " ")
    text = _PERIOD.sub("", text, count=_MAX_PERIODS)
    words = (DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the mean over annotators of min(1, others who gave the prediction / 3).

    If all annotators wrote the same text, neither it nor the prediction is normalized: such answers are often read off
    the image.
    """
    prediction, *answers = (text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers))
    if len(set(answers)) > 1:
        prediction, *answers = (normalize_answer(text) for text in (prediction, *answers))
    agrees = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(agrees) - left_out) / MIN_AGREEING) for left_out in agrees) / max(len(agrees), 1)


def vqa_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> MeanMetric:
    """Return VQA v2's accuracy; each question has the answers of all its annotators, repeated as often as given.

    Blank answers are answers. Questions with so few answers that no prediction can score 1 have weight 0.

    Raises:
        UserError: the numbers of predictions and questions differ.
    """
    check_same_length("VQA accuracy", answers=len(predictions), questions=len(answers))
    weights = np.asarray([float(len(given) > MIN_AGREEING) for given in answers])
    return MeanMetric(weights * [soft_accuracy(*pair) for pair in zip(predictions, answers, strict=True)], weights)
