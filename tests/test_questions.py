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
from methods.selection import row_of


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
    assert {q.task for q in load_questions(str(tmp_path / "q.jsonl"), task="math", limit=3)} == {"math"}
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
        ("0", "1,007"), ("1", "2"), ("0x", "1")]  # fmt: skip
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


ROW = {"id": "a", "answer": "2"}
CHAT = [{"role": "user", "content": "1+1?"}]


@pytest.mark.parametrize(
    "row, question, system",
    [
        ({"instruction": "Add the numbers.", "input": "1 and 4"}, "Add the numbers.\n\n1 and 4", None),
        ({"instruction": "Answer in 1 word.", "input": "1"}, "Answer in 1 word.\n\n1", None),
        ({"instruction": "Go.", "input": " "}, "Go.", None),
        ({"question": "Who?", "context": "Ann won.", "passage": "In 1990."}, "Who?\n\nAnn won.\n\nIn 1990.", None),
        ({"prompt": "Who?\nAnn won.", "context": "Ann won."}, "Who?\nAnn won.", None),  # shown already
        ({"question": "q", "system": "be brief", "system_prompt": "be kind"}, "q", "be brief\n\nbe kind"),
        (
            {"prompt": [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}, *CHAT]},
            "1+1?",
            "A\n\nB",
        ),
        ({"messages": [*CHAT, {"role": "assistant", "content": "It is 2."}]}, "1+1?", None),
        ({"question": "1+1?", "prompt": [{"role": "user", "content": "Be brief. 1+1?"}]}, "Be brief. 1+1?", None),
    ],
)
def test_every_part_of_a_row_reaches_the_prompt(tmp_path, row, question, system):
    (q,) = load_questions(write(tmp_path / "q.jsonl", [ROW | row]))
    assert (q.question, q.system) == (question, system)
    assert q.meta == {}
    assert load_questions(write(tmp_path / "again.jsonl", [row_of(q)])) == [q]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "q", "context": {"title": ["t"]}}, "field 'context' is .*, not text"),
        ({"question": "q", "input": 5}, "field 'input' is '5', not text"),
        ({"question": "q", "system": ["s"]}, "field 'system' is .*, not text"),
        ({"question": "q", "choices": ["A", "B"]}, "field 'choices' would not reach the prompt"),
        ({"question": "q", "history": [["a", "b"]]}, "field 'history' would not reach the prompt"),
        ({"question": "q", "instruction": "Be brief."}, "fields 'question' and 'instruction' ask different things"),
        ({"question": "2+2?", "prompt": CHAT}, "fields '.*' and '.*' ask different things"),
        ({"prompt": [*CHAT, {"role": "assistant", "content": "2"}, *CHAT]}, "field 'prompt' part 0 is a turn beside"),
        ({"prompt": [*CHAT, {"role": "assistant", "content": "It"}]}, "'prompt' part 1 is a turn beside .*assistant"),
        ({"question": "q", "answer": [" ", ""]}, "missing or empty field 'answer'"),
        ({"question": "q", "answer": ["a", None]}, "field 'answer' is .* not a text or a list of texts"),
        ({"question": "q", "answer": True}, "field 'answer' is 'True', not a text"),
        ({"question": "q", "answer": "so " * 300}, "field 'answer' has 900 characters and no final"),
        ({"question": "q", "min_tool_calls": "1"}, "field 'min_tool_calls' is '1', not a whole number"),
        ({"question": "q", "task": "function", "answer": "f()"}, "field 'answer' is .* not a list of calls"),
        ({"question": "q", "task": "function", "answer": [{"f": {}, "g": {}}]}, "'answer' part 0 is not {function"),
        ({"question": "q", "task": "function", "answer": [{"f": {"x": "Rome"}}]}, "field 'answer' part 0 is not"),
        ({"question": "q", "pass_rate": float("nan")}, "field 'pass_rate' is nan"),
        ({"question": "q", "answer": float("nan")}, "field 'answer' is nan"),
        ({"question": "\ud83d"}, "field 'question' holds half a surrogate pair"),
    ],
)
def test_what_finds_no_place_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"q\.jsonl:1: .*{message}"):
        load_questions(write(tmp_path / "q.jsonl", [ROW | row]))


@pytest.mark.parametrize(
    "solution, gold",
    [
        ("Add.\n####72", "72"),
        ("Add. ####72", "72"),
        ("#### 72\n", "72"),
        ("#### 1\n####  1,007 ", "1,007"),
        ("a #### b\nand more", "a #### b\nand more"),
        ("72", "72"),
        (["Add.\n####72", "70"], ["72", "70"]),
        (72, 72),
    ],
)
def test_worked_solutions_are_what_they_end_in(solution, gold):
    assert question_of({"id": "a", "question": "q", "answer": solution}, "here").gold == gold


def test_function_rows_in_parquet_are_those_of_jsonl(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    kinds = {"type": "integer", "description": "side"}, {"type": "string", "enum": ["m", "cm"]}
    tools = [
        [{"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {p: kind}}}}]
        for (name, p), kind in zip((("area", "a"), ("scale", "unit")), kinds)
    ]
    rows = [
        {"id": "1", "question": "Area?", "task": "function", "tools": tools[0], "answer": [{"area": {"a": [3]}}]},
        {"id": "2", "question": "Unit?", "task": "function", "tools": tools[1], "answer": [{"scale": {"unit": ["m"]}}]},
    ]
    table = pyarrow.Table.from_pylist(rows)
    assert table.to_pylist()[0]["answer"] == [{"area": {"a": [3]}, "scale": None}]  # what Arrow makes of them
    parquet.write_table(table, tmp_path / "q.parquet")
    read = load_questions(str(tmp_path / "q.parquet"))
    assert read == load_questions(write(tmp_path / "q.jsonl", rows))
    assert read == load_questions(write(tmp_path / "nulls.jsonl", table.to_pylist()))  # as datasets exports them
    assert [q.tools for q in read] == tools and calls_match([ToolCall("area", {"a": 3})], read[0].gold, read[0].tools)
    parquet.write_table(pyarrow.table({"question": ["q"], "answer": [float("nan")]}), tmp_path / "nan.parquet")
    with pytest.raises(DataError, match="nan.parquet: row 0: field 'answer' is nan"):
        load_questions(str(tmp_path / "nan.parquet"))


def test_csv(tmp_path):
    path = tmp_path / "q.csv"
    lines = ["id,question,answer,family", ',"Who, in', 'France?","[""Paris"", ""paris""]",', "x,1+1?,2,add"]
    lines.append(',i?,"[0, 1]",')
    path.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    who, add, interval = load_questions(str(path))
    assert (who.id, who.question, who.gold, who.task) == ("0", "Who, in\r\nFrance?", ["Paris", "paris"], "qa")
    assert (add.id, add.gold, add.task, add.meta) == ("x", "2", "math", {"family": "add"})
    assert (interval.gold, interval.task) == ("[0, 1]", "math")  # no list of texts
    for text, message in (
        ("question,answer\nq,1,2\n", "q.csv:2: more cells"),
        ("question,answer\nq\n", "q.csv:2: missing or empty field 'answer'"),
        ("question;answer\nq;1\n", "q.csv:2: missing field 'question'"),
        ("question,answer,answer\nq,1,2\n", "names a field twice"),
        ('question,answer\n"q,1\n', "q.csv: not CSV"),
        ("", "holds no questions"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            load_questions(str(path))


def test_one_line_says_what_was_read(tmp_path, capsys):
    rows = [{"question": f"{i}", "answer": "1"} for i in range(3)] + [{"question": "x", "answer": ["a"]}]
    path = write(tmp_path / "q.jsonl", [*rows, {"question": "y", "answer": "a", "task": "qa"}])
    load_questions(path)
    load_questions(path)  # said once
    said = "3 math (answer is a string), 1 qa (answer is a list), 1 qa (field 'task')"
    assert capsys.readouterr().out == f"{path}: 5 questions: {said}\n"
    load_questions(path, task="qa", limit=2)
    assert capsys.readouterr().out == f"{path}: 2 questions: 2 qa (--task qa)\n"


def test_unknown_sources_are_named(tmp_path):
    for source in ("", str(tmp_path), str(tmp_path / "none.jsonl"), "x.csv"):
        with pytest.raises(DataError, match="no such file|expected a .jsonl"):
            load_questions(source)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": 5}, "field 'question' is '5', not text"),
        ({"question": " "}, "empty field 'question'"),
        ({"question": "q", "answer": {"v": 2}}, "field 'answer' is .* not a text or a list of texts"),
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
