"""Function-call grader: real BFCL items, right and perturbed, and the rules one by one.

Run: TARE_DATA=… python -m pytest tests/test_bfcl.py
"""

import json
import os
from pathlib import Path

import pytest

from core.trajectory import ToolCall
from eval.bfcl import calls_match

FILES = ("simple_python", "multiple", "parallel", "parallel_multiple", "live_simple")


def rows(name):
    root = os.environ.get("TARE_DATA")
    if not root:
        pytest.skip("TARE_DATA is not set: no BFCL items here")
    return [json.loads(line) for line in open(Path(root) / "bfcl" / f"{name}.jsonl", encoding="utf-8")]


def pick(allowed):
    """One admissible value; inside a dict every key holds its own list of admissible values."""
    value = next(a for a in allowed if a != "")
    if isinstance(value, dict):
        return {k: pick(v) for k, v in value.items() if "" not in v}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [{k: pick(v) for k, v in item.items()} for item in value]
    return value


def right_calls(row, optional):
    calls = []
    for wanted in row["ground_truth"]:
        [(name, allowed)] = wanted.items()
        [parameters] = [f["parameters"] for f in row["function"] if f["name"] == name]
        must = parameters.get("required", [])
        keep = [p for p, v in allowed.items() if "" not in v or p in must or (optional and v != [""])]
        calls.append(ToolCall(name, {p: pick(allowed[p]) for p in keep}))
    return calls


def perturbed(calls):
    """Every way to spoil one call: name, one value, one missing or one unknown parameter; one call less or more."""
    yield calls[1:]
    yield calls + calls[:1]
    for i, call in enumerate(calls):
        variants = [ToolCall(call.name + "x", call.arguments), ToolCall(call.name, {**call.arguments, "unheard_of": 1})]
        variants.append(ToolCall(call.name, json.dumps(call.arguments), ok=False, error="malformed"))
        for p, v in call.arguments.items():
            wrong = v + 7919 if type(v) in (int, float) else f"{v} spoilt"
            variants.append(ToolCall(call.name, {**call.arguments, p: wrong}))
        for variant in variants:
            yield calls[:i] + [variant] + calls[i + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_right_calls_of_real_items_pass_and_spoilt_ones_fail(name):
    for row in rows(name):
        gold, functions = row["ground_truth"], row["function"]
        if [] in [allowed for wanted in gold for p in wanted.values() for allowed in p.values()]:
            assert row["id"] == "live_simple_106-63-0"  # admits no value for a required parameter: no call can pass
            continue
        for optional in (True, False):
            calls = right_calls(row, optional)
            assert calls_match(calls, gold, functions), row["id"]
            assert calls_match(calls, gold), row["id"]
            assert calls_match(calls[::-1], gold, functions), row["id"]  # the order is free
        for wrong in perturbed(right_calls(row, True)):
            assert not calls_match(wrong, gold, functions), (row["id"], wrong)


def test_irrelevance_asks_for_no_call():
    for row in rows("irrelevance"):
        assert row["expect_no_call"] and calls_match([], [], row["function"])
        assert not calls_match([ToolCall(row["function"][0]["name"], {})], [], row["function"])
    assert not calls_match([ToolCall("f", "{broken", ok=False, error="not JSON")], [])


def declared(kind, required=("x",), **more):
    return [
        {"name": "geo.area", "parameters": {"properties": {"x": {"type": kind, **more}}, "required": list(required)}}
    ]


@pytest.mark.parametrize(
    "value, allowed, kind, expected",
    [
        (3, [3.0], "float", True),  # an int may stand for a float
        (3.0, [3], "integer", False),  # but not the reverse
        ("3", [3], "integer", False),
        (True, [1], "integer", False),
        (1, [True], "boolean", False),
        ("San Francisco, C.A.", ["san francisco CA"], "string", True),
        ("it's", ['IT"S'], "string", True),
        ("x^2", ["x2"], "string", True),
        ("rate", ["rate"], "float", True),  # a variable name where a number is declared
        (5, ["rate"], "float", False),
        ("", [5, ""], "integer", False),  # "" among the values only says that x may be left out
        (None, ["", None], "string", True),
        (None, ["a"], "string", False),
        ([1, 2], [[1, 2]], "array", True),
        ([2, 1], [[1, 2]], "array", False),
        ([1, 2], [[1, 2]], "tuple", True),
        (["New York"], [["new-york"]], "array", True),
        ({"a": 1}, [{"a": [1, 2], "b": ["", 3]}], "dict", True),
        ({"a": 3}, [{"a": [1, 2], "b": ["", 3]}], "dict", False),
        ({"b": 3}, [{"a": [1, 2], "b": ["", 3]}], "dict", False),
        ({"a": 1, "c": 1}, [{"a": [1, 2]}], "dict", False),
        ([{"a": "U S"}], [[{"a": ["us"]}]], "array", True),
        ("anything", ["anything"], "any", True),
    ],
)
def test_values_and_types(value, allowed, kind, expected):
    assert calls_match([ToolCall("geo.area", {"x": value})], [{"geo.area": {"x": allowed}}], declared(kind)) is expected


def test_item_types_of_lists():
    gold = [{"geo.area": {"x": [[1, 2]]}}]
    integers = declared("array", items={"type": "integer"})
    assert calls_match([ToolCall("geo.area", {"x": [1, 2]})], gold, integers)
    assert not calls_match([ToolCall("geo.area", {"x": [1.0, 2]})], gold, integers)


def test_optional_and_required_parameters():
    gold = [{"geo.area": {"x": [1, ""]}}]
    assert calls_match([ToolCall("geo.area", {})], gold, declared("integer", required=()))
    assert not calls_match([ToolCall("geo.area", {})], gold, declared("integer"))  # declared as required
    assert not calls_match([ToolCall("geo.area", {})], [{"geo.area": {"x": [1]}}])
    assert not calls_match([ToolCall("geo.area", {"x": True})], [{"geo.area": {"x": [1]}}])  # without a declaration too


def test_names_with_dots_and_openai_style_declarations():
    gold = [{"geo.area": {"x": [1]}}]
    openai = [{"type": "function", "function": declared("integer")[0]}]
    assert calls_match([ToolCall("geo_area", {"x": 1})], gold, openai)
    assert not calls_match([ToolCall("geo_area", {"x": 1.0})], gold, openai)
    assert not calls_match([ToolCall("area", {"x": 1})], gold, openai)


def test_parallel_matching_is_not_greedy():
    gold = [{"f": {"x": [1, 2]}}, {"f": {"x": [1]}}]
    assert calls_match([ToolCall("f", {"x": 1}), ToolCall("f", {"x": 2})], gold)  # the first gold call must take x=2
    assert not calls_match([ToolCall("f", {"x": 2}), ToolCall("f", {"x": 2})], gold)
    with pytest.raises(ValueError, match="names one function"):
        calls_match([ToolCall("f", {})], [{"f": {}, "g": {}}])
