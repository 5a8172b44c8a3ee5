"""Segment entropies, the entropy rewards and tool-level advantages on trajectories laid out by hand.

    python -m pytest tests/test_entropy.py
"""

from math import isnan, nan
from types import SimpleNamespace

import pytest

from core.segments import call_turns, entropy_changes, mean_entropy, reducing, segment_entropies, turns_of
from core.trajectory import UNCLOSED, Span, ToolCall, Trajectory
from eval.behaviour import call_labels
from grpo import rewards
from grpo.advantages import ADVANTAGES

FLAGS = SimpleNamespace(
    indicator="entropy", segment="reasoning", delta_margin=0.0, delta_form="difference", dense_alpha=0.5
)


def lay_out(*pieces, calls=(), idx=0, **fields):
    """A trajectory from (kind, entropies) pieces after a prompt of two tokens; "result" tokens have mask 0."""
    mask, entropy, spans = [0, 0], [0.0, 0.0], []
    for kind, values in pieces:
        start = len(mask)
        model = kind != "tool_result"
        mask += [int(model)] * len(values)
        entropy += [float(v) * model for v in values]
        spans.append(Span(kind, start, start + len(values)))
    fields = {"finish": "eos", "gold": "x", "question_id": "q", "mode": "think"} | fields
    return Trajectory(
        sample_idx=idx,
        token_ids=list(range(len(mask))),
        prompt_len=2,
        loss_mask=mask,
        sampled=True,
        response_text="",
        spans=spans,
        tool_calls=list(calls),
        entropy=entropy,
        **fields,
    )


def search(query="a", **kw):
    return ToolCall("search", query, **kw)


TWO_CALLS = [
    ("think", [2, 4]), ("text", [0]), ("tool_call", [8, 8]), ("tool_result", [9, 9, 9]),
    ("think", [1]), ("tool_call", [5]), ("tool_result", [9]),
    ("think", [3]), ("answer", [0, 0]),
]  # fmt: skip


def test_segments_by_hand():
    """Turns (2 4 | 0 | 8 8), (1 | 5), (3 | 0 0): what counts depends on --segment."""
    t = lay_out(*TWO_CALLS, calls=[search(), search("b")])
    assert segment_entropies(t) == [2.0, 1.0, 3.0]
    assert segment_entropies(t, "reasoning_with_answer") == [2.0, 1.0, 1.0]
    assert segment_entropies(t, "with_call") == pytest.approx([22 / 5, 3.0, 1.0])
    assert segment_entropies(t, "think") == [3.0, 1.0, 3.0]
    assert [(turn.start, turn.end, turn.call) for turn in call_turns(t)] == [(2, 7, 5), (10, 12, 11)]
    assert mean_entropy(t) == pytest.approx((2 + 4 + 8 + 8 + 1 + 5 + 3) / 10)
    assert segment_entropies(t, entropy=[7.0] * len(t.token_ids)) == [7.0, 7.0, 7.0]


def test_a_sure_answer_makes_no_call_look_reducing():
    """Thoughts 2 and 2.5 around the call: ΔH = 0.5; the answer's zeros in the segment would make it −1."""
    t = lay_out(("think", [2, 2]), ("tool_call", [5]), ("tool_result", [9]), ("think", [2, 3]), ("text", [2.5]),
                ("answer", [0] * 5), ("text", [0]), calls=[search()])  # fmt: skip
    assert segment_entropies(t) == [2.0, 2.5] and reducing(segment_entropies(t)) == [False]
    assert segment_entropies(t, "reasoning_with_answer") == pytest.approx([2.0, 7.5 / 9])
    cut = lay_out(("think", [2, 2]), ("tool_call", [5]), ("tool_result", [9]), ("think", [2, 4]), calls=[search()])
    assert segment_entropies(cut) == segment_entropies(cut, "reasoning_with_answer") == [2.0, 3.0]  # no answer yet


def test_in_hermes_the_answer_is_what_follows_the_last_thought():
    pieces = [("think", [2]), ("tool_call", [7]), ("tool_result", [0]), ("think", [3]), ("text", [0, 0])]
    t = lay_out(*pieces, calls=[search()], dialect="hermes")
    assert segment_entropies(t) == [2.0, 3.0] and segment_entropies(t, "reasoning_with_answer") == [2.0, 1.0]


def test_changes_and_indicators_by_hand():
    assert entropy_changes([2.0, 1.0, 1.0]) == [-1.0, 0.0]
    assert reducing([2.0, 1.0, 1.0]) == [True, False]
    assert reducing([2.0, 1.0], 1.0) == [False] and reducing([2.0, 1.0], 0.99) == [True]
    assert reducing([2.0, 1.0], 0.6) == [True]
    assert reducing([2.0, nan, 1.0]) == [False, False] and reducing([2.0]) == []
    with pytest.raises(ValueError, match="n \\+ 1"):
        reducing([])


def test_several_calls_in_one_turn_count_as_one():
    """hermes: two calls, the end mark, their results in one span, then the answer."""
    pieces = [
        ("think", [2]), ("tool_call", [7]), ("text", [7]), ("tool_call", [7]), ("text", [7]),
        ("tool_result", [0, 0]), ("think", [1]), ("text", [1, 1]),
    ]  # fmt: skip
    t = lay_out(*pieces, calls=[search(), search("b")], dialect="hermes")
    assert segment_entropies(t) == [2.0, 1.0] and segment_entropies(t, "with_call") == [6.0, 1.0]


@pytest.mark.parametrize(
    "segment, last", [("reasoning", 4.0), ("reasoning_with_answer", 4.0), ("with_call", 5.0), ("think", 4.0)]
)
def test_an_unclosed_call_is_no_call(segment, last):
    t = lay_out(("think", [4]), ("tool_call", [6]), calls=[search(error=UNCLOSED, ok=False)], finish="length")
    assert segment_entropies(t, segment) == [last] and call_turns(t) == []


def test_a_call_that_nothing_follows_reduces_nothing():
    t = lay_out(("think", [4]), ("tool_call", [6]), calls=[search()], finish="tool_limit")
    first, last = segment_entropies(t)
    assert first == 4.0 and isnan(last) and reducing([first, last]) == [False]


def test_a_closed_call_before_an_unclosed_one_in_the_last_turn():
    calls = [search(), search("b", error=UNCLOSED, ok=False)]
    t = lay_out(("tool_call", [6]), ("tool_call", [6]), calls=calls, dialect="hermes", finish="length")
    assert [turn.closed for turn in turns_of(t)] == [True]


def test_empty_segments_are_nan_and_masked_tokens_do_not_count():
    t = lay_out(("tool_call", [6]), ("tool_result", [0]), ("text", [1]), ("answer", [0]), calls=[search()])
    assert isnan(segment_entropies(t)[0]) and segment_entropies(t)[1] == 1.0
    assert all(map(isnan, segment_entropies(t, "think")))
    bare = lay_out(("tool_call", [6]), ("tool_result", [0]), ("answer", [1]), calls=[search()])
    assert all(map(isnan, segment_entropies(bare)))  # it calls and answers without a thought
    hinted = lay_out(("think", [2, 6]), calls=[])
    hinted.loss_mask[3], hinted.entropy[3] = 0, 0.0
    assert segment_entropies(hinted) == [2.0]


def test_missing_entropies_or_spans_are_an_error():
    t = lay_out(*TWO_CALLS, calls=[search(), search("b")])
    t.entropy = None
    with pytest.raises(ValueError, match="q/0 has no token entropies"):
        segment_entropies(t)
    with pytest.raises(ValueError, match="no token entropies"):
        mean_entropy(t)
    t.spans = []
    with pytest.raises(ValueError, match="2 calls but no spans"):
        turns_of(t)


# ---------------------------------------------------------------------------------------------------- rewards


def test_sparse_by_hand():
    assert rewards.entropy_sparse(1.0, [3.0, 2.0, 1.0]) == 1.0
    assert rewards.entropy_sparse(0.8, [3.0, 2.0, 2.5, 1.0, nan]) == pytest.approx(0.8 * 2 / 4)
    assert rewards.entropy_sparse(1.0, [1.0, 2.0]) == 0.0
    assert rewards.entropy_sparse(0.7, [1.0]) == 0.7 and rewards.entropy_sparse(0.7, [nan]) == 0.7  # n = 0
    assert rewards.entropy_sparse(1.0, [3.0, 2.9, 1.0], margin=0.2) == 0.5


def test_dense_by_hand():
    assert rewards.entropy_dense(1.0, [3.0, 2.0, 2.5]) == [1.5, 1.0]
    assert rewards.entropy_dense(0.4, [3.0, 2.0, nan], alpha=0.25) == pytest.approx([0.5, 0.4])
    assert rewards.entropy_dense(1.0, [3.0]) == [] and rewards.entropy_dense(0.0, [3.0, 1.0]) == [0.0]
    assert rewards.entropy_dense(1.0, [3.0, 2.9], margin=0.2) == [1.0]


def pair():
    """Two trajectories: calls with I = 1, 0, and one call with I = 1 that ends in the wrong answer."""
    a = lay_out(*TWO_CALLS, calls=[search(), search("b")], meta={"min_tool_calls": 1})
    b = lay_out(
        ("think", [2]), ("tool_call", [1]), ("tool_result", [0]), ("think", [1]), ("answer", [1]), calls=[search()],
        idx=1, meta={"min_tool_calls": 1},
    )  # fmt: skip
    return [a, b]


def test_adapters_zero_a_malformed_response():
    group = pair()
    sparse = rewards.REWARDS["entropy_sparse"](group, [1.0, 1.0], [True, False], FLAGS)
    assert [r["total"] for r in sparse] == [0.5, 0.0] and [r["reducing"] for r in sparse] == [0.5, 1.0]
    (alone,) = rewards.REWARDS["entropy_sparse"]([lay_out(("answer", [1]))], [1.0], [True], FLAGS)
    assert alone == {"total": 1.0, "correct": 1.0}  # no calls, no share of them
    dense = rewards.REWARDS["entropy_dense"](group, [1.0, 1.0], [True, False], FLAGS)
    assert [r["total"] for r in dense] == [1.25, 0.0] and [r["outcome"] for r in dense] == [1.0, 0.0]
    assert {r["correct"] for r in sparse + dense} == {1.0}  # in every reward what the grader said


def test_dense_advantages_of_two_trajectories_by_hand():
    """Calls earn 1.5, 1.0 (right answer) and 0 (wrong): mean 5/6, deviations 4/6, 1/6, −5/6, sample variance 7/12.

    Outcomes 1 and 0: deviations ±1/2, sample variance 1/2.
    """
    group = pair()
    terms = rewards.REWARDS["entropy_dense"](group, [1.0, 0.0], [True, True], FLAGS)
    a, b = ADVANTAGES["entropy_dense"](group, terms, FLAGS)
    std, half = (7 / 12) ** 0.5, 0.5 / 0.5**0.5
    first, second, third = (x / std for x in (4 / 6, 1 / 6, -5 / 6))
    assert a == pytest.approx([0, 0] + [first] * 5 + [0] * 3 + [second] * 2 + [0] + [half] * 3, abs=1e-5)
    assert b == pytest.approx([0, 0] + [third] * 2 + [0] + [-half] * 2, abs=1e-5)


def test_dense_without_calls_is_the_outcome_advantage():
    group = [lay_out(("think", [2]), ("answer", [1]), idx=i) for i in range(2)] + [pair()[1]]
    terms = rewards.REWARDS["entropy_dense"](group, [1.0, 0.0, 0.5], [True] * 3, FLAGS)
    out = ADVANTAGES["entropy_dense"](group, terms, FLAGS)
    assert out[0] == pytest.approx([0, 0, 1, 1], abs=1e-5) and out[1] == pytest.approx([0, 0, -1, -1], abs=1e-5)
    assert out[2] == pytest.approx([0] * 7, abs=1e-9)  # a single call has no baseline; the outcome is the mean


def test_dense_gives_an_unclosed_call_the_outcome_advantage():
    """It is no call: the last segment runs on through it, and there is no reward of its own."""
    cut = [search(), search("b", error=UNCLOSED, ok=False)]
    pieces = [("think", [2]), ("tool_call", [1]), ("tool_result", [0]), ("think", [1]), ("tool_call", [1])]
    group = [lay_out(*pieces, calls=cut, finish="length"), pair()[1]]
    out = ADVANTAGES["entropy_dense"](group, [{"outcome": 0.0}, {"outcome": 1.0}], FLAGS)
    half = 0.5**0.5
    assert out[0] == pytest.approx([0, 0, -half, -half, 0, -half, -half], abs=1e-5)
    assert out[1] == pytest.approx([0, 0, half, half, 0, half, half], abs=1e-5)


# ---------------------------------------------------------------------------------------------------- indicators


def test_labels_by_hand():
    calls = [search(ok=False), search("a"), search("b"), search("A "), search("c")]
    t = lay_out(("think", [1]), calls=calls, meta={"min_tool_calls": 2})
    assert call_labels(t) == ["failed", "needed", "needed", "repeated", "redundant"]


def test_oracle_and_reference_indicators():
    group = pair()
    oracle = SimpleNamespace(**vars(FLAGS) | {"indicator": "oracle"})
    assert rewards.call_indicators(group, oracle) == [[True, False], [True]]
    reference = SimpleNamespace(**vars(FLAGS) | {"indicator": "reference"})
    for t in group:
        t.ref_entropy = [float(m) for m in t.loss_mask]  # flat: nothing is reduced
    assert rewards.call_indicators(group, reference) == [[False, False], [False]]
    assert rewards.call_indicators(group, FLAGS) == [[True, False], [True]]


def test_random_indicators_keep_the_rate_and_forget_the_call():
    random = SimpleNamespace(**vars(FLAGS) | {"indicator": "random"})
    firsts = []
    for i in range(40):
        group = pair()
        group[0].token_ids[0] = 100 + i
        (first, second), (third,) = found = rewards.call_indicators(group, random)
        assert first + second + third == 2 and found == rewards.call_indicators(group, random)
        firsts.append(second)
    assert 15 < sum(firsts) < 38  # 2 of 3 expected; never with --indicator entropy


def test_an_oracle_turn_of_parallel_calls_is_needed_if_one_call_is():
    pieces = [("tool_call", [7]), ("text", [7]), ("tool_call", [7]), ("tool_result", [0]), ("text", [1])]
    t = lay_out(*pieces, calls=[search(ok=False), search("b")], dialect="hermes", meta={"min_tool_calls": 1})
    oracle = SimpleNamespace(**vars(FLAGS) | {"indicator": "oracle"})
    assert rewards.call_indicators([t], oracle) == [[True]]
