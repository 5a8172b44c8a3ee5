"""Behaviour errors on hand-written trajectories; the expected labels were set from the definitions, by hand.

Run: python -m pytest tests/test_behaviour.py
"""


import pytest

from core.parse import parse_calls, spans_of
from core.trajectory import Trajectory
from eval.behaviour import (
    call_spread,
    duplicate_calls,
    failure_histogram,
    insufficient,
    rates,
    redundant_calls,
    unused_calls,
    void_turns,
)
from eval.grader import correctness


def make(text, failed=(), question="How old is the bridge?", task="qa", gold="x", qid="q", idx=0, finish="eos", **meta):
    """A trajectory whose tokens are characters; calls and results are read from the text, `failed` marks ok=False."""
    dialect = "hermes" if task == "function" else "tags"
    calls = parse_calls(text, dialect)
    results = [text[a:b] for kind, a, b in spans_of(text, dialect) if kind == "tool_result"]
    for i, (call, result) in enumerate(zip(calls, results)):
        call.result, call.ok = result, call.ok and i not in failed
    return Trajectory(
        question_id=qid,
        sample_idx=idx,
        mode="think",
        token_ids=[1] * (1 + len(text)),
        prompt_len=1,
        loss_mask=[0] + [1] * len(text),
        sampled=True,
        response_text=text,
        spans=[],
        tool_calls=calls,
        finish=finish,
        gold=gold,
        question=question,
        task=task,
        dialect=dialect,
        meta=meta,
    )


def turn(thought, tool, arguments, result):
    return f"<think>{thought}</think>\n<{tool}>{arguments}</{tool}>\n<result>\n{result}\n</result>\n"


SEARCH = turn("look it up", "search", "age of the bridge", "The bridge was opened in 1932.")
ANSWER = "<think>so 1932</think>\n<answer>1932</answer>"


@pytest.mark.parametrize(
    "second, failed, expected",
    [
        ("age of the bridge", (), [1]),
        ("Age of a  BRIDGE!", (), [1]),  # case, articles, punctuation and spaces do not make a new query
        ("age of the tunnel", (), []),
        ("age of the bridge", (0,), []),  # a retry after an error
        ("age of the bridge", (1,), [1]),  # repeated although the first had worked, and refused
    ],
)
def test_duplicate_calls(second, failed, expected):
    text = SEARCH + turn("again", "search", second, "The bridge was opened in 1932.") + ANSWER
    assert duplicate_calls(make(text, failed)) == expected


def test_code_is_compared_with_its_signs_and_case():
    code = ["a = 1+2\nprint(a)", "a = 1-2\nprint(a)", "A = 1+2\nprint(A)", "a = 1+2\n\nprint(a) "]
    text = "".join(turn("go", "python", c, "3") for c in code) + ANSWER
    assert duplicate_calls(make(text)) == [3]


@pytest.mark.parametrize(
    "result, later, expected",
    [
        ("The bridge was opened in 1932.", "it is from 1932", []),
        ("The bridge was opened in 1932.", "it is from 1933", [0]),
        ("How old is the bridge?", "the bridge is old", [0]),  # adds nothing to the question
        ("Look it up, look it up!", "look up", [0]),  # adds nothing to the thought before it
        ("population 1,200.0", "1200 people", []),  # one number, two spellings
        ("an answer is here", "yes", [0]),  # tag names are not words: <answer> uses nothing
        ("", "yes", [0]),
        ("then they were", "then they were", [0]),  # common words
    ],
)
def test_unused_calls(result, later, expected):
    text = turn("look it up", "search", "age", result) + f"<think>{later}</think>\n<answer>{later}</answer>"
    assert unused_calls(make(text)) == expected
    assert redundant_calls(make(text)) == len(expected)


def test_a_result_used_by_the_next_call_only_and_a_failed_call_are_not_unused():
    chain = turn("who", "search", "author", "Written by Lomax.") + turn("when", "search", "Lomax born", "Born 1901.")
    assert unused_calls(make(chain + "<answer>1901</answer>")) == []
    assert unused_calls(make(chain + "<answer>no idea</answer>")) == [1]
    assert unused_calls(make(turn("go", "python", "1/0", "ZeroDivisionError") + ANSWER, failed=(0,))) == []
    assert unused_calls(make("<think>a</think><search>open end")) == []


def test_the_world_counts_executed_calls_against_the_need():
    two = SEARCH + turn("check", "search", "another query", "nothing new") + ANSWER
    assert redundant_calls(make(two, min_tool_calls=1)) == 1
    assert redundant_calls(make(two, min_tool_calls=0)) == 2
    assert redundant_calls(make(two, min_tool_calls=2)) == 0  # the unused result is no evidence against the known need
    assert redundant_calls(make(two, failed=(0,), min_tool_calls=1)) == 0  # one of the two did not run
    assert redundant_calls(make(SEARCH + SEARCH + ANSWER, min_tool_calls=2)) == 1  # a repeat never helps


def test_insufficient_in_the_world_and_in_a_group():
    assert insufficient(make(ANSWER, min_tool_calls=1), 0.0)
    assert insufficient(make(ANSWER, min_tool_calls=1), 0.8) and not insufficient(make(ANSWER, min_tool_calls=1), 1.0)
    assert not insufficient(make(ANSWER, min_tool_calls=0), 0.0)
    assert insufficient(make(SEARCH + ANSWER, failed=(0,), min_tool_calls=1), 0.0)  # the failed call does not count
    short, long = make(ANSWER), make(SEARCH + ANSWER, idx=1)
    assert insufficient(short, 0.5, [(short, 0.5), (long, 1.0)])
    assert not insufficient(short, 0.5, [(short, 0.5), (long, 0.8)])  # F1 of .8 is not yet correct
    assert not insufficient(long, 0.0, [(short, 1.0), (long, 0.0)])
    assert not insufficient(short, 0.0)


@pytest.mark.parametrize(
    "text, task, expected",
    [
        (SEARCH + ANSWER, "qa", 0),
        (SEARCH + "<think>hm</think>", "qa", 1),
        (SEARCH, "qa", 1),
        ("", "qa", 1),
        ("<think>cut <search>in a thought</search>", "qa", 1),
        (SEARCH + "<search>cut off", "qa", 0),  # a malformed call is a call
        ("it is \\boxed{5}", "math", 0),
        ("<think>no tool fits</think>I cannot do that.", "function", 0),
        ("<think>no tool fits</think>\n", "function", 1),
        ("<think>no tool fits</think><|im_end|>", "function", 1),
        ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "function", 0),
    ],
)
def test_void_turns(text, task, expected):
    assert void_turns(make(text, task=task)) == expected


def test_an_ending_that_the_limit_chose_is_no_void_turn():
    assert void_turns(make(SEARCH, finish="tool_limit")) == 0
    assert void_turns(make(SEARCH + "<think>so", finish="length")) == 1


def test_parallel_results_leave_no_void_turn():
    calls = '<tool_call>{"name": "f", "arguments": {"x": %d}}</tool_call>'
    text = (
        calls % 1
        + calls % 2
        + "\n<tool_response>\n7\n</tool_response>\n<tool_response>\n8\n</tool_response>\nboth 7 and 8"
    )
    trajectory = make(text, task="function")
    assert void_turns(trajectory) == 0 and unused_calls(trajectory) == [] and duplicate_calls(trajectory) == []


def test_rates_and_histograms_by_hand():
    group = [
        make(SEARCH + ANSWER, idx=0),
        make(SEARCH + SEARCH + ANSWER, idx=1),  # repeated; its result adds nothing to the first
        make(SEARCH + ANSWER, failed=(0,), idx=2),
        make("<think>guess</think><answer>1900</answer>", idx=3),
    ]
    measured = rates(group, [1.0, 1.0, 1.0, 0.0])
    assert measured == {
        "redundant": 0.25,
        "redundant_calls": 0.25,  # 1 of 4 calls
        "insufficient": 0.25,
        "failed": 0.25,
        "duplicate": 0.25,
        "unused": 0.25,
        "void": 0.0,
    }
    assert failure_histogram(group) == {0: 3, 1: 1}
    assert call_spread(group, [1.0, 1.0, 1.0, 0.0]) == {1: 1}
    assert call_spread(group, [1.0, 0.0, 0.0, 0.0]) == {}
    assert rates(group[3:], [0.0])["failed"] == 0.0
    assert rates(group[3:], [0.0])["insufficient"] is None  # one sample, and no word on how many calls are needed
    told = make("<answer>1900</answer>", qid="r", min_tool_calls=1)
    assert rates([group[3], told], [0.0, 0.0])["insufficient"] == 1.0  # of those that it is known of


def test_correctness_by_task():
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 2}}\n</tool_call>'
    assert correctness(make("<answer>\\boxed{0.5}</answer>", task="math", gold="1/2")) == 1.0
    assert correctness(make("<answer>the 1932</answer>", gold=["1932", "in 1932"])) == 1.0
    assert correctness(make("<answer>June 1932</answer>", gold=["1932"])) == pytest.approx(2 / 3)
    assert correctness(make("<think>1932</think>", gold=["1932"])) == 0.0
    assert correctness(make(call, task="function", gold=[{"f": {"x": [1, 2]}}])) == 1.0
    assert correctness(make(call, task="function", gold=[{"f": {"x": [1]}}])) == 0.0
    assert correctness(make("none fits", task="function", gold=[])) == 1.0
    assert correctness(make(call, task="function", gold=[])) == 0.0
