"""Rewards against numbers worked out by hand.

    python -m pytest tests/test_rewards.py
"""

from types import SimpleNamespace

import pytest

from grpo.rewards import REWARDS, autotool, et_agent, otc


def test_et_agent_by_hand():
    """n = 0, 1, 2 (mean 1), lengths 10, 20, 30 (mean 20, population std 8.165), sigma_tool 1, sigma_length 2."""
    terms = et_agent([1.0, 0.5, 1.0], [0, 1, 2], [10, 20, 30], [True, True, False], 1.0, 2.0)
    sigmoid_1, sigmoid_z = 0.731058578630, 0.920524128684  # 1/(1+e^-1), 1/(1+e^-2.449489743)
    assert terms[0]["f_tool"] == pytest.approx(sigmoid_1)
    assert terms[0]["f_length"] == pytest.approx(sigmoid_z)
    assert terms[0]["total"] == pytest.approx(sigmoid_1 * sigmoid_z)
    assert terms[1] == pytest.approx({"total": 0.5 / 4, "correct": 0.5, "f_tool": 0.5, "f_length": 0.5, "format": 0.0})
    assert terms[2]["total"] == pytest.approx((1 - sigmoid_1) * (1 - sigmoid_z) - 1)
    assert terms[2]["format"] == -1.0


def test_et_agent_gain_and_zero_spread():
    """Released code: g = 2, so an average trajectory keeps its correctness; equal lengths have z = 0."""
    terms = et_agent([1.0, 0.0], [3, 3], [7, 7], [True, True], 0.5, 0.5, behaviour_gain=2.0)
    assert [t["total"] for t in terms] == [1.0, 0.0]


def test_et_agent_never_pays_for_a_wrong_answer():
    terms = et_agent([0.0, 1.0], [0, 9], [1, 900], [True, True], 2.0, 2.0)
    assert terms[0]["total"] == 0.0 < terms[1]["total"]


def test_et_agent_survives_extreme_sigma():
    terms = et_agent([1.0, 1.0], [0, 1000], [1, 1], [True, True], 50.0, 0.0)
    assert terms[0]["f_tool"] == 1.0 and terms[1]["f_tool"] == pytest.approx(0.0)


@pytest.mark.parametrize("lists", [([], [], [], []), ([1.0], [1, 2], [1], [True])])
def test_et_agent_refuses_ragged_groups(lists):
    with pytest.raises(ValueError, match="equal length"):
        et_agent(*lists, 0.1, 0.1)


@pytest.mark.parametrize(
    "correct, think, well_formed, reward",
    [(True, False, True, 1.0), (True, True, True, 0.5), (False, True, True, -0.5), (False, False, True, -1.0)]
    + [(c, t, False, -1.0) for c in (True, False) for t in (True, False)],
)
def test_autotool_table(correct, think, well_formed, reward):
    assert autotool(correct, think, well_formed) == reward


def sample(mode="think", calls=0, tokens=0):
    return SimpleNamespace(mode=mode, n_calls=calls, completion_tokens=tokens)


def test_autotool_adapter_asks_for_more_than_the_f1_of_the_flywheel():
    group = [sample("no_think"), sample("no_think"), sample("think"), sample("think")]
    terms = REWARDS["autotool"](group, [0.81, 0.8, 1.0, 1.0], [True, True, True, False], None)
    assert [t["total"] for t in terms] == [1.0, -1.0, 0.5, -1.0]
    assert [t["format"] for t in terms] == [0.0, 0.0, 0.0, -1.0] and terms[1]["correct"] == 0.8


def test_penalties_by_hand():
    group = [sample(calls=3, tokens=50), sample(calls=0, tokens=100)]
    args = SimpleNamespace(call_penalty=0.1, length_penalty=0.5, max_completion_length=200)
    calls = REWARDS["calls_penalty"](group, [1.0, 1.0], [True, False], args)
    assert [t["total"] for t in calls] == pytest.approx([0.7, 0.0])
    length = REWARDS["length_penalty"](group, [1.0, 0.0], [True, True], args)
    assert [t["total"] for t in length] == pytest.approx([0.5 - 0.125, -0.5 - 0.25])


def test_otc_by_hand():
    """n = 2: m = 2 keeps S; m = 4: f = 16/6, sin(2π/3) = .866; m = 1: f = 4/3, sin(π/3) = .866; m = 0: sin 0 = 0."""
    terms = otc([1.0, 1.0, 0.5, 0.5], [2, 4, 1, 0], [True, True, False, False], 6)
    assert [t["total"] for t in terms] == pytest.approx([1.0, 3**0.5 / 2, 3**0.5 / 4, 0.0])
    assert terms[1] == pytest.approx({"total": 3**0.5 / 2, "correct": 1.0, "f_tool": 3**0.5 / 2})
    # n = 0: m = 2 of at most 4 calls: cos(2π/8); m = 4: cos(4π/12) = 1/2
    assert [t["f_tool"] for t in otc([1.0] * 3, [0, 2, 4], [True] * 3, 4)] == pytest.approx([1.0, 2**-0.5, 0.5])
    assert [t["total"] for t in otc([0.4, 0.0], [1, 3], [False, False], 6)] == [0.4, 0.0]  # nothing to compare with


def test_otc_adapter_takes_n_from_right_and_well_formed_samples():
    group = [sample(calls=1), sample(calls=0), sample(calls=0), sample(calls=3)]
    terms = REWARDS["otc"](group, [1.0, 1.0, 0.5, 1.0], [True, False, True, True], SimpleNamespace(**LIMIT))
    assert [t["total"] for t in terms] == pytest.approx([1.0, 0.0, 0.0, 2**-0.5])  # sin(3π/4)
    assert [t["correct"] for t in terms] == [1.0, 1.0, 0.5, 1.0]


LIMIT = {"max_tool_calling_iterations": 6}


def test_outcome_reward_counts_no_answer_in_a_malformed_response():
    terms = REWARDS["correct"]([sample(), sample()], [1.0, 0.5], [False, True], None)
    assert [(t["total"], t["correct"]) for t in terms] == [(0.0, 1.0), (0.5, 0.5)]
