"""Paired differences of two variants with a 95 % interval over seeds and questions, and the verdict on a claim.

Values are (S, Q): per seed, per held-out question, the same questions for both variants and all seeds. Pure numpy.
"""

from typing import Literal, NamedTuple

import numpy as np

Verdict = Literal["holds", "fails", "undecided"]
T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t for 1 … 9 degrees of freedom


class Interval(NamedTuple):
    """A mean difference and the ends of its 95 % interval; the ends are nan for a single seed."""

    mean: float
    low: float
    high: float


def paired_interval(a: list[list[float]], b: list[list[float]], resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of a − b with a two-level bootstrap interval: seeds and questions are drawn anew, each with replacement.

    Few seeds make that interval too narrow where seeds differ more than questions do, so it is widened to Student's t
    over the seeds' means where that one is wider (tests/test_intervals.py simulates the coverage of both).
    ValueError unless a and b have the same shape (S >= 1, Q >= 1).
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 2 or not a.size:
        raise ValueError(f"paired values need the same seeds and questions, found {a.shape} and {b.shape}")
    difference = a - b  # (S, Q)
    seeds, questions = difference.shape
    mean, per_seed = float(difference.mean()), difference.mean(axis=1)
    if seeds == 1:
        return Interval(mean, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(questions, np.full(questions, 1 / questions), size=resamples)  # (R, Q)
    means = counts @ difference.T / questions  # (R, S): each seed's mean over the drawn questions
    drawn = rng.integers(seeds, size=(resamples, seeds))  # (R, S)
    low, high = np.quantile(np.take_along_axis(means, drawn, axis=1).mean(axis=1), (0.025, 0.975))
    reach = T_975[min(seeds - 1, len(T_975)) - 1] * per_seed.std(ddof=1) / seeds**0.5
    return Interval(mean, float(min(low, mean - reach)), float(max(high, mean + reach)))


def verdict(effect: Interval, at_least: float, correctness: Interval | None, margin: float) -> Verdict:
    """A claim's verdict; effect: signed so that the claim says it is positive.

    holds: the effect's interval lies above 0, its mean reaches `at_least`, and correctness is not lower by `margin` or
    more with 95 % confidence. fails: the interval reaches neither above 0 nor up to `at_least`, or correctness is
    certainly lower by more than the margin. Else undecided. correctness None: the claim is about correctness itself.
    """
    if effect.low > 0 and effect.mean >= at_least and (correctness is None or correctness.low > -margin):
        return "holds"
    return "fails" if failure(effect, at_least, correctness, margin) else "undecided"


def failure(effect: Interval, at_least: float, correctness: Interval | None, margin: float) -> str:
    """Why a claim fails: opposite, smaller (than `at_least`, or nothing) or correctness; "" if it does not."""
    if effect.high < 0:
        return "opposite"
    if effect.high <= 0 or effect.high < at_least:
        return "smaller"
    return "correctness" if correctness is not None and correctness.high < -margin else ""
