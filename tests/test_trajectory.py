"""Trajectory invariants and jsonl files.

    python -m pytest tests/test_trajectory.py
"""

import dataclasses
import gzip
import json

import pytest

from core.trajectory import (
    UNCLOSED,
    DataError,
    Span,
    ToolCall,
    Trajectory,
    check_tokenizer,
    groups_of,
    load_trajectories,
    read_jsonl,
    save_trajectories,
    write_jsonl,
)


def make(**changes):
    values = dict(
        question_id="q1",
        sample_idx=0,
        mode="think",
        token_ids=[5, 6, 7, 8, 9, 10],
        prompt_len=2,
        loss_mask=[0, 0, 1, 1, 0, 1],
        sampled=True,
        response_text="<python>1</python> ünïcode",
        spans=[Span("tool_call", 2, 4), Span("tool_result", 4, 5), Span("answer", 5, 6)],
        tool_calls=[ToolCall("python", "1", "1"), ToolCall("search", {"query": "x"}, ok=False, error=UNCLOSED)],
        finish="eos",
        gold=["a", "b"],
        old_logp=[0.0, 0.0, -0.1, -1 / 3, 0.0, -2.5],
    )
    return Trajectory(**values | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss_mask": [0, 0, 1]}, "loss_mask has 3 entries for 6 tokens"),
        ({"loss_mask": [0, 1, 1, 1, 0, 1]}, "loss_mask is 1 inside the prompt"),
        ({"loss_mask": [0, 0, 1, 1, 1, 1]}, "inside the tool result"),
        ({"loss_mask": [0, 0, 2, 1, 0, 1]}, "other than 0 and 1"),
        ({"old_logp": [0.0, 0.0, -1.0, -1.0, -1.0, -1.0]}, "old_logp is non-zero where loss_mask is 0"),
        ({"entropy": [0.0]}, "entropy has 1 entries"),
        ({"spans": [Span("answer", 3, 5), Span("text", 4, 6)]}, "overlaps"),
        ({"spans": [Span("answer", 1, 3)]}, "leaves"),
        ({"spans": [Span("answer", 3, 3)]}, "empty"),
        ({"spans": [Span("poem", 3, 4)]}, "poem"),
        ({"prompt_len": 0}, "prompt_len 0"),
        ({"mode": "maybe"}, "mode 'maybe'"),
        ({"finish": "stop"}, "finish 'stop'"),
        ({"dialect": "xml"}, "dialect 'xml'"),
    ],
)
def test_broken_invariants_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_counts():
    t = make()
    assert (t.n_calls, t.failed_calls, t.completion_tokens) == (1, 1, 3)


def test_jsonl_round_trip_is_exact(tmp_path):
    ts = [make(), make(sample_idx=1, entropy=[0.0, 0.0, 0.1 + 0.2, 1e-30, 0.0, 7.0], rewards={"total": 1 / 3})]
    path = tmp_path / "t.jsonl"
    assert save_trajectories(path, ts) == 2
    assert load_trajectories(path) == ts
    save_trajectories(tmp_path / "again.jsonl", load_trajectories(path))
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not valid JSON|Expecting"),
        ("[1]", "JSON object"),
        (json.dumps({"question_id": "x"}), "missing field 'spans'"),
        (make().to_json().replace('"finish"', '"finnish"'), "unknown field 'finnish'"),
        (make().to_json().replace('"prompt_len": 2', '"prompt_len": 3'), "span|prompt"),
        (json.dumps({k: v for k, v in dataclasses.asdict(make()).items() if k != "gold"}), "gold"),
        (make().to_json().replace('"prompt_len": 2', '"prompt_len": "x"'), "prompt_len is 'x', not of type int"),
        (json.dumps(dataclasses.asdict(make()) | {"tool_calls": 5}), "tool_calls is '5', not of type list"),
        (json.dumps(dataclasses.asdict(make()) | {"loss_mask": None}), "loss_mask is 'None', not of type list"),
        (json.dumps(dataclasses.asdict(make()) | {"meta": None}), "meta is 'None', not of type dict"),
        (json.dumps(dataclasses.asdict(make()) | {"meta": {"min_tool_calls": "1"}}), "min_tool_calls is '1'"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(make().to_json() + "\n\n" + line + "\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl:3: .*({message})"):
        load_trajectories(path)


def test_read_jsonl(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": 2})]
    path.write_text('{"a": 1}\n[3]\n')
    with pytest.raises(DataError, match=r"x\.jsonl:2: expected a JSON object, found list"):
        list(read_jsonl(path))
    with pytest.raises(DataError, match="no such file"):
        list(read_jsonl(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    "value, message",
    [
        ("NaN", "field 'extra.x[1]' is nan"),
        ("-Infinity", "field 'extra.x[1]' is -inf"),
        ("1e999", "field 'extra.x[1]' is inf"),
        (r'"a \ud83d"', "field 'extra.x[1]' holds half a surrogate pair: 'a \\ud83d'"),
        (r'{"\ud83d": 1}', "field 'extra.x[1].\\ud83d' holds half"),
        ("1" * 5000, "not valid JSON: Exceeds the limit"),
        ("[" * 100_000, "not valid JSON: maximum recursion"),
    ],
)
def test_what_cannot_be_written_again_is_refused_when_read(tmp_path, value, message):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": 1, "extra": {"x": [0, %s]}}\n' % value)
    with pytest.raises(DataError) as found:
        list(read_jsonl(tmp_path / "x.jsonl"))
    assert f"x.jsonl:2: {message}" in ascii(str(found.value)).replace("\\\\", "\\").replace("\\'", "'")
    t = make().to_json().replace('"gold": ["a", "b"]', f'"gold": {value}')
    (tmp_path / "x.jsonl").write_text(t + "\n")
    with pytest.raises(DataError, match=r"x\.jsonl:1: "):
        load_trajectories(tmp_path / "x.jsonl")


def test_nothing_is_written_that_is_refused_when_read(tmp_path):
    with pytest.raises(ValueError):
        write_jsonl(tmp_path / "x.jsonl", [{"a": float("nan")}])


def test_jsonl_of_other_editors_and_gzip(tmp_path):
    rows = [(1, {"a": "x\u2028y\x85z"}), (3, {"a": "é"})]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for _, row in rows)
    for name, content in (
        ("bom.jsonl", b"\xef\xbb\xbf" + text.encode()),
        ("crlf.jsonl", text.replace("\n", "\r\n").encode()),
        ("x.jsonl.gz", gzip.compress(text.encode())),
    ):
        (tmp_path / name).write_bytes(content)
        assert list(read_jsonl(tmp_path / name)) == rows
    save_trajectories(tmp_path / "t.jsonl", [make()])
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress((tmp_path / "t.jsonl").read_bytes()))
    assert load_trajectories(tmp_path / "t.jsonl.gz") == [make()]
    for content in (b"plain", gzip.compress(text.encode())[:-9], gzip.compress(text.encode())[:20]):
        (tmp_path / "x.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"x\.jsonl\.gz: cannot be read"):
            list(read_jsonl(tmp_path / "x.jsonl.gz"))
    (tmp_path / "x.jsonl").write_bytes(text.encode("utf-16"))
    with pytest.raises(DataError, match="not UTF-8 text"):
        list(read_jsonl(tmp_path / "x.jsonl"))


def test_groups_keep_order():
    ts = [make(question_id=q, sample_idx=i) for q, i in (("b", 1), ("a", 0), ("b", 0))]
    assert [[(t.question_id, t.sample_idx) for t in g] for g in groups_of(ts)] == [[("b", 0), ("b", 1)], [("a", 0)]]


class Reads:
    """A tokenizer of given texts."""

    def __init__(self, **texts):
        self.texts = {int(name[1:]): text for name, text in texts.items()}

    def decode(self, ids):
        return "".join(self.texts.get(i, "") for i in ids)


def test_ids_of_another_tokenizer_are_named():
    """Model-written tokens count, in order; spaces, undecodable bytes and Unicode forms do not, nor tool results."""

    def written(text, ids, mask):
        return Trajectory("q", 3, "think", [9, *ids], 1, [0, *mask], True, text, [], [], "eos", "")

    mine = Reads(_1="call ", _2="e\u0301t", _3="done", _4="\ufffd", _9="prompt", _7="result")
    good = [
        written("call result. \u00e9t done", [1, 7, 2, 3], [1, 0, 1, 1]),
        written("call", [1, 4], [1, 1]),
        written("", [5], [1]),
    ]
    check_tokenizer(good, mine, "t.jsonl")
    check_tokenizer(good[:1], Reads(_1="call", _2="\u00e9t", _3="done"), "t.jsonl")
    for other in (Reads(_1="x", _2="\u00e9t", _3="done"), Reads(_1="done", _2="call", _3=""), Reads()):
        with pytest.raises(DataError, match="t.jsonl: trajectory q/3 is of another tokenizer"):
            check_tokenizer(good, other, "t.jsonl")
