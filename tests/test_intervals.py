"""Intervals and verdicts: hand-made values, and the coverage of the interval by simulation.

    python -m pytest tests/test_intervals.py
"""

import math

import numpy as np
import pytest

from eval.intervals import Interval, paired_interval, verdict


def test_known_mean_difference():
    a = [[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]]
    b = [[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    mean, low, high = paired_interval(a, b)
    assert mean == 0.5 and low < 0.5 < high  # differences 1 0 0 1 and 0 1 1 0
    back = paired_interval(b, a)
    assert back.mean == -0.5 and back.low == pytest.approx(-high, abs=0.1)


def test_equal_differences_have_an_interval_of_one_point():
    a, b = np.full((5, 7), 0.75), np.full((5, 7), 0.5)
    assert paired_interval(a, b) == (0.25, 0.25, 0.25)
    assert paired_interval(a, a) == (0.0, 0.0, 0.0)


def test_pairing_removes_what_both_variants_share():
    rng = np.random.default_rng(0)
    hard = rng.normal(size=(1, 200)) * 10
    a = hard + rng.normal(size=(5, 200)) * 0.01 + 0.1
    interval = paired_interval(a, np.repeat(hard, 5, axis=0))
    assert 0.09 < interval.low < interval.high < 0.11


def test_student_where_seeds_differ_and_questions_do_not():
    """Seed means .1 .2 .3 .4 .5: mean .3, sd .1581, reach 2.78 · .1581 / √5 = .1966."""
    a = np.repeat(np.array([[0.1], [0.2], [0.3], [0.4], [0.5]]), 9, axis=1)
    mean, low, high = paired_interval(a, np.zeros_like(a))
    assert mean == pytest.approx(0.3)
    assert (low, high) == (pytest.approx(0.1034, abs=2e-4), pytest.approx(0.4966, abs=2e-4))


def test_questions_count_where_all_seeds_agree():
    """Every seed gives the same 0 or 1 per question: only the draw of questions matters, sd = .5 / √100 = .05."""
    a = np.repeat((np.arange(100) % 2)[None].astype(float), 5, axis=0)
    mean, low, high = paired_interval(a, np.zeros_like(a))
    assert mean == 0.5 and low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.012)
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.012)


def test_one_seed_has_a_mean_and_no_interval():
    mean, low, high = paired_interval([[1.0, 0.0]], [[0.0, 0.0]])
    assert mean == 0.5 and math.isnan(low) and math.isnan(high)
    assert verdict(Interval(mean, low, high), 0.0, None, 0.01) == "undecided"


@pytest.mark.parametrize("b", [[[1.0, 2.0]], [[1.0], [1.0]], [1.0, 2.0]])
def test_other_seeds_or_questions_are_refused(b):
    with pytest.raises(ValueError, match="same seeds and questions"):
        paired_interval([[1.0, 2.0], [3.0, 4.0]], b)


@pytest.mark.parametrize("seed_sd, question_sd, noise", [(0.05, 0.0, 0.1), (0.0, 0.3, 0.1), (0.02, 0.2, 0.5)])
def test_coverage(seed_sd, question_sd, noise):
    """300 simulated claims of 5 seeds and 100 questions: the interval holds the true difference in about 95 of 100."""
    rng, hits = np.random.default_rng(1), 0
    for trial in range(300):
        a = 0.2 + rng.normal(size=(5, 1)) * seed_sd + rng.normal(size=(1, 100)) * question_sd
        a = a + rng.normal(size=(5, 100)) * noise
        _, low, high = paired_interval(a, np.zeros_like(a), resamples=300, seed=trial)
        hits += low <= 0.2 <= high
    assert 0.93 <= hits / 300 <= 0.995, hits / 300


GOOD = Interval(0.0, -0.005, 0.005)  # correctness within a point
WORSE = Interval(-0.03, -0.04, -0.02)
OPEN = Interval(-0.005, -0.02, 0.01)


@pytest.mark.parametrize(
    "effect, at_least, correctness, expected",
    [
        ((0.2, 0.1, 0.3), 0.0, GOOD, "holds"),
        ((0.2, 0.1, 0.3), 0.0, None, "holds"),
        ((0.2, 0.0, 0.3), 0.0, GOOD, "undecided"),  # touches 0
        ((0.2, 0.1, 0.3), 0.25, GOOD, "undecided"),  # above 0, but less than claimed
        ((0.2, 0.1, 0.3), 0.4, GOOD, "fails"),  # the claimed size is excluded
        ((0.2, 0.1, 0.3), 0.0, WORSE, "fails"),
        ((0.2, 0.1, 0.3), 0.0, OPEN, "undecided"),
        ((0.2, 0.1, 0.3), 0.0, Interval(0.0, -0.01, 0.01), "undecided"),  # just not within the margin
        ((-0.2, -0.3, -0.1), 0.0, GOOD, "fails"),
        ((0.0, 0.0, 0.0), 0.0, GOOD, "fails"),  # all equal: there is no effect
        ((0.01, -0.01, 0.03), 0.05, GOOD, "fails"),
        ((0.01, -0.1, 0.2), 0.05, GOOD, "undecided"),
        ((0.2, 0.2, 0.2), 0.0, GOOD, "holds"),
    ],
)
def test_verdicts(effect, at_least, correctness, expected):
    assert verdict(Interval(*effect), at_least, correctness, 0.01) == expected
