"""Question files of every supported format, and what is said about bad rows.

    python -m pytest tests/test_questions.py         (real files: TARE_DATA=DIR)
"""

import json
import os
from pathlib import Path

import pytest

from core.trajectory import DataError, ToolCall
from data.questions import load_questions, question_of
from eval.bfcl import calls_match


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_own_rows_and_their_aliases(tmp_path):
    rows = [
        {"id": "a", "question": " 1+1? ", "answer": "2", "family": "add", "min_tool_calls": 0, "notes": [1]},
        {"qid": "b", "question": "who?", "golden_answers": ["x", "y"]},
        {"id": 3, "problem": "p", "ground_truth": "7", "task": "qa"},
        {"id": "f", "question": "call", "answer": [{"f": {"x": [1]}}], "task": "function", "tools": [{"name": "f"}]},
    ]
    a, b, c, f = load_questions(write(tmp_path / "q.jsonl", rows))
    assert (a.id, a.question, a.gold, a.task) == ("a", "1+1?", "2", "math")
    assert a.meta == {"family": "add", "min_tool_calls": 0}  # short scalar fields only
    assert (b.id, b.gold, b.task) == ("b", ["x", "y"], "qa")
    assert (c.id, c.task) == ("3", "qa")
    assert f.tools == [{"name": "f"}] and f.task == "function"
    assert {q.task for q in load_questions(str(tmp_path / "q.jsonl"), task="math")} == {"math"}
    assert len(load_questions(str(tmp_path / "q.jsonl"), limit=2)) == 2


def test_trl_and_verl_rows(tmp_path):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}]
    rows = [
        {"id": "t", "prompt": chat, "solution": "2"},
        {"data_source": "d", "prompt": chat, "ability": "qa", "reward_model": {"ground_truth": ["2"]},
         "extra_info": {"index": 5, "split": "train"}},
    ]  # fmt: skip
    trl, verl = load_questions(write(tmp_path / "q.jsonl", rows))
    assert (trl.question, trl.system, trl.gold) == ("1+1?", "be brief", "2")
    assert (verl.id, verl.gold, verl.task) == ("d-train-5", ["2"], "qa")


def test_rows_without_ids_and_solutions_of_gsm8k(tmp_path):
    solution = "She has 4 + 3 = <<4+3=7>>7 eggs.\nSo 7.\n#### 1,007"
    rows = [{"question": "eggs?", "answer": solution}, {"question": "b", "answer": "#### 2"}, {"id": "0x", "question": "c", "answer": "1"}]
    assert [(q.id, q.gold) for q in load_questions(write(tmp_path / "q.jsonl", rows))] == [
        ("0", "1,007"), ("1", "#### 2"), ("0x", "1")]  # fmt: skip
    with pytest.raises(DataError, match="missing field 'id'"):
        question_of(rows[0], "here")


def test_a_dataset_id_may_name_a_configuration(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or [{"question": "q", "answer": "1"}])
    assert [q.gold for q in load_questions("openai/gsm8k:main", split="test")] == ["1"]
    load_questions("owner/name")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"}), (("owner/name", None), {"split": "train"})]


def test_bfcl_rows(tmp_path):
    ask = [{"role": "user", "content": "area of 3 by 4?"}]
    parameters = {"type": "dict", "properties": {"a": {"type": "float"}, "type": {"type": "string"}}, "required": ["a"]}
    functions = [{"name": "area", "description": "an area", "parameters": parameters}]
    truth = [{"area": {"a": [3.0], "type": ["", "flat"]}}]
    rows = [
        {"id": "simple_1", "question": [ask], "function": functions, "ground_truth": truth},
        {"id": "irrelevance_2", "question": [ask], "function": functions},
    ]
    simple, irrelevant = load_questions(write(tmp_path / "q.jsonl", rows))
    assert (simple.question, simple.gold, simple.task) == ("area of 3 by 4?", truth, "function")
    schema = simple.tools[0]["function"]["parameters"]
    assert schema["type"] == "object" and schema["properties"]["a"] == {"type": "number"}
    assert schema["properties"]["type"] == {"type": "string"}  # a parameter of that name stays one
    assert calls_match([ToolCall("area", {"a": 3})], simple.gold, simple.tools)
    assert not calls_match([ToolCall("area", {"a": "3"})], simple.gold, simple.tools)
    (named,) = load_questions(write(tmp_path / "n.jsonl", [{"id": "a", "question": "q", "answer": "2", "function": "f"}]))
    assert named.task == "math"  # a field of that name is no BFCL row
    assert irrelevant.gold == [] and calls_match([], irrelevant.gold, irrelevant.tools)
    for broken, message in (({"question": [ask, ask]}, "several turns"), ({"ground_truth": None}, "field 'answer'")):
        with pytest.raises(DataError, match=rf"q\.jsonl:1: .*{message}"):
            load_questions(write(tmp_path / "q.jsonl", [rows[0] | broken]))


def test_unknown_sources_are_named(tmp_path):
    for source in ("", str(tmp_path), str(tmp_path / "none.jsonl"), "x.csv"):
        with pytest.raises(DataError, match="no such file|expected an existing"):
            load_questions(source)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": 5}, "field 'question' is '5', not text"),
        ({"question": " "}, "empty field 'question'"),
        ({"question": "q", "answer": {"v": 2}}, "field 'answer' is .* not a text or a list"),
        ({"question": "q", "tools": "no"}, "field 'tools' is 'no', not a list"),
        ({"prompt": ["hi"]}, "field 'prompt' part 0 has no text 'role'"),
        ({"prompt": [{"role": "user", "content": "a"}, {"role": "user"}]}, "field 'prompt' part 1 has no text 'content'"),
        ({"question": "q", "extra_info": "x"}, "field 'extra_info' is 'x', not an object"),
        ({"question": "q", "reward_model": [1]}, "field 'reward_model' is .* not an object"),
    ],
)
def test_fields_of_a_wrong_type_are_named(tmp_path, row, message):
    path = write(tmp_path / "q.jsonl", [{"id": "a", "answer": "2"} | row])
    with pytest.raises(DataError, match=rf"q\.jsonl:1: {message}"):
        load_questions(path)


def test_a_file_that_is_no_parquet(tmp_path):
    (tmp_path / "q.parquet").write_text("x")
    with pytest.raises(DataError, match="q.parquet: not a parquet file"):
        load_questions(str(tmp_path / "q.parquet"))


@pytest.mark.parametrize(
    "file, n, task",
    [
        ("math/gsm8k_test.jsonl", 150, "math"),
        ("qa/musique.jsonl", 120, "qa"),
        ("rl/arpo_train_240.parquet", 240, None),
        ("rl/etagent_valid.parquet", 96, None),
        ("retrieval/questions.jsonl", 384, "qa"),
        ("bfcl/multiple.jsonl", 70, "function"),
        ("bfcl/irrelevance.jsonl", 70, "function"),
    ],
)
def test_real_files(file, n, task):
    root = os.environ.get("TARE_DATA")
    if not root:
        pytest.skip("TARE_DATA is not set: no real data here")
    questions = load_questions(str(Path(root) / file))
    assert len(questions) == n
    assert {q.task for q in questions} == ({task} if task else {"math", "qa"})
