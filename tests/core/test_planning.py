"""The planner finds the least error that its law knows of, and says where the law ends."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmaccel import plan
from mmaccel.planning import LAWS, MOST_TOKENS

TOKENS = (1, 4, 16, 36, 64, 144, 576)
PUBLISHED = {  # accuracies of arXiv:2411.03312 by billions of parameters; the last one of 7 B at OCR is missing
    "reasoning": {
        0.5: (0.3855, 0.3917, 0.4078, 0.4133, 0.4151, 0.4244, 0.4320),
        1.8: (0.4333, 0.4519, 0.4528, 0.4597, 0.4609, 0.4758, 0.4808),
        4: (0.4630, 0.4692, 0.4858, 0.4916, 0.5023, 0.5092, 0.5185),
        7: (0.4810, 0.4971, 0.5050, 0.5141, 0.5172, 0.5238, 0.5354),
    },
    "ocr": {
        0.5: (0.0979, 0.1183, 0.1551, 0.1911, 0.1942, 0.2211, 0.2608),
        1.8: (0.1052, 0.1375, 0.1753, 0.2073, 0.2206, 0.2585, 0.3096),
        4: (0.1268, 0.1559, 0.1927, 0.2320, 0.2604, 0.2882, 0.3461),
        7: (0.1391, 0.1643, 0.2050, 0.2392, 0.2618, 0.2880),
    },
}


def squares(task, factor, alpha, beta):
    return sum(
        (1 - accuracy - factor / (size**alpha * tokens**beta)) ** 2
        for size, row in PUBLISHED[task].items()
        for tokens, accuracy in zip(TOKENS, row, strict=False)
    )


@pytest.mark.parametrize(("task", "residual"), [("reasoning", 3.8e-4), ("ocr", 4.6e-3)])
def test_the_constants_are_the_least_squares_fit_of_the_published_accuracies(task, residual):
    law = LAWS[task]
    found = squares(task, law.factor, law.alpha, law.beta)
    assert found == pytest.approx(residual, rel=0.03)
    for change in np.vstack([np.eye(3), -np.eye(3)]) * 2e-3:
        moved = np.array([law.factor, law.alpha, law.beta]) + change
        assert squares(task, *moved) > found


@given(flops=st.floats(1e10, 1e14), text=st.integers(0, 3000), tokens=st.integers(1, MOST_TOKENS))
def test_no_other_split_of_the_same_compute_is_better(flops, text, tokens):
    for task, law in LAWS.items():
        best = plan(flops, text, task)
        assert best.error <= law.error(flops / (2 * (text + tokens)), tokens) * (1 + 1e-12)
        assert best.flops == pytest.approx(flops)
        assert best.over_full <= 1 + 1e-12


def test_the_optimum_is_the_closed_form():
    assert plan(1e12, 50).visual_tokens in (13, 14)  # the paper draws its line at 14
    assert plan(1e12, 0).visual_tokens == 1
    assert plan(1e12, 500).visual_tokens in (135, 136)
    assert plan(1e12, 50, "ocr").visual_tokens == MOST_TOKENS


def test_of_the_sizes_there_are_the_best_affordable_one_is_taken():
    few = plan(2 * 7e9 * 60, 50, sizes=(0.5e9, 1.8e9, 7e9, 14e9))
    assert (few.parameters, few.visual_tokens) == (7e9, 10)
    assert few.flops <= 2 * 7e9 * 60
    many = plan(2 * 7e9 * 60, 50, "ocr", sizes=(0.5e9, 1.8e9, 7e9))
    assert (many.parameters, many.visual_tokens) == (0.5e9, MOST_TOKENS)
    assert plan(2 * 7e9 * 60, 50, "ocr", sizes=(1.8e9, 7e9)).visual_tokens == 183


def test_a_plan_says_where_the_law_ends():
    assert "0.0082 B parameters lie outside the 0.5 to 14 B" in str(plan(1e9, 48))
    assert "do not compress" in str(plan(2 * 7e9 * 600, 50, "ocr"))
    assert plan(2 * 7e9 * 64, 50).warnings == ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1e12, 50, "maths"), "fitted for reasoning, ocr; got 'maths'"),
        ((0, 50), r"flops and sizes lie between 1 and 1e\+40, text_tokens from 0 up; got flops=0"),
        ((float("inf"), 50), "got flops=inf"),
        ((1e12, 50, "reasoning", (3e-293,)), r"sizes=\(3e-293,\)"),
        ((1e12, -1), "text_tokens from 0 up"),
        ((1e9, 50, "reasoning", (7e9,)), r"flops=1e\+09 affords none of the sizes .* needs 7.14e\+11"),
    ],
)
def test_plans_that_cannot_be_made_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(*arguments)
