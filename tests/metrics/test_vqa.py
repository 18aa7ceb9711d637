"""VQA's answer normalization and soft accuracy."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.errors import UserError
from mplug2_jax.metrics.vqa import CONTRACTIONS, normalize_answer, soft_accuracy, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes!", "yes"),
        ("the two dogs", "2 dogs"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("A", ""),
        ("an  apple\nand a  pear", "apple and pear"),
        ("red-and-white", "red and white"),
        ("red -and-white", "red andwhite"),  # next to a space once, removed everywhere
        ("black/white, red", "black white red"),
        ("1,000", "1000"),
        ("1,000-ton truck", "1000ton truck"),  # with a comma between digits no mark becomes a space
        ("1,b", "1 b"),
        ("2.5", "2.5"),
        ("u.s.", "us"),
        ("5.", "5"),
        ("v.2", "v.2"),
        ("." * 34, ".."),
        ("4:30 p.m.", "4:30 pm"),  # colons and apostrophes are not marks
        ("dont know", "don't know"),
        ("Im", "im"),
        ("somebody'd", "somebodyd"),
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),  # one apostrophe is restored, not two
        ("she'll shed", "she'll shed"),
    ],
)
def test_normalized_answers(answer, normal):
    assert normalize_answer(answer) == normal


def test_contractions_are_the_originals():
    assert len(CONTRACTIONS) == 114  # the original has 120: 4 in capitals never match, and 2 change nothing
    assert {"ow's'at", "'ows'at", "'ow'sat"} == {wrong for wrong, right in CONTRACTIONS.items() if right == "'ow's'at"}
    assert not {"shed", "were", "well", "its", "hell"} & set(CONTRACTIONS)


@pytest.mark.parametrize(("agree", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_an_answer_scores_by_how_many_others_gave_it(agree, expected):
    """If 3 agree, each of the 3 has 2 others, and the other 7 have 3: (3 * 2/3 + 7 * 1) / 10."""
    answers = ["red"] * agree + [f"blue {i}" for i in range(10 - agree)]
    assert soft_accuracy("red", answers) == pytest.approx(expected)


def test_nothing_is_normalized_if_all_annotators_wrote_the_same():
    assert soft_accuracy("The End.", ["The End."] * 10) == 1
    assert soft_accuracy("end", ["The End."] * 10) == 0
    assert soft_accuracy("yes.", ["yes"] * 10) == 0
    assert soft_accuracy(" yes\n", ["yes", "yes "] * 5) == 1  # outer spaces are ignored
    assert soft_accuracy("end", ["The End."] * 9 + ["the end"]) == 1


@given(st.lists(st.sampled_from(["yes", "no", "Yes.", "the no", ""]), min_size=4, max_size=10), st.sampled_from("yn"))
def test_the_order_of_annotators_does_not_matter_and_the_score_is_the_mean_over_all_nine(answers, first):
    prediction = {"y": "yes", "n": "no"}[first]
    score = soft_accuracy(prediction, answers)
    assert score == pytest.approx(soft_accuracy(prediction, answers[::-1]))
    if len(set(answers)) > 1:
        agree = [normalize_answer(answer) == prediction for answer in answers]
        others = itertools.combinations(agree, len(agree) - 1)
        assert score == pytest.approx(np.mean([min(1, sum(of) / 3) for of in others]))


def test_vqa_accuracy_is_the_mean_over_questions_and_can_be_weighted():
    metric = vqa_accuracy(["red", "two"], [["red"] + ["blue"] * 9, ["2"] * 4 + ["3"] * 6])
    assert metric.value == pytest.approx((0.3 + 1) / 2)
    assert metric.weighted(np.asarray([3.0, 1.0])) == pytest.approx((3 * 0.3 + 1) / 4)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["yes"] * 2 + [""] * 3 + ["no"] * 5, 0.6),
        ([""] * 6 + ["yes"] * 4, 1.0),
        (["yes"] * 3 + ["no"] * 7, 0.9),
        (["yes", "yes", *[""] * 8], 0.6),
        ([""] * 10, 0.0),
    ],
)
def test_blank_answers_count(given, expected):
    assert vqa_accuracy(["yes"], [given]).value == pytest.approx(expected)


def test_questions_with_too_few_annotators_have_weight_0():
    given = [["red"] * 10, [], ["red"] * 3, ["red"] * 2 + ["blue"] * 2]
    assert vqa_accuracy(["red"] * 4, given).value == pytest.approx((1 + (2 * 1 / 3 + 2 * 2 / 3) / 4) / 2)
    assert vqa_accuracy(["red"], [["red"] * 3]).value == 0


def test_different_lengths_are_an_error():
    with pytest.raises(UserError, match="found 1 answers and 2 questions"):
        vqa_accuracy(["red"], [["red"] * 10] * 2)
