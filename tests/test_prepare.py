"""Real data to demonstrations and question files: GSM8K with code that ran, multi-hop questions with a real index.

Run: TARE_DATA=… python -m pytest tests/test_prepare.py
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from core.parse import parse_calls, render_result, well_formed
from core.trajectory import DataError
from data import prepare_gsm8k, prepare_multihop
from data.questions import load_questions
from tools.search import SearchIndex, render


def data(*parts):
    root = os.environ.get("TARE_DATA")
    if not root:
        pytest.skip("TARE_DATA is not set: no GSM8K or MuSiQue rows here")
    return str(Path(root, *parts))


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def text_of(row):
    return "".join(p["text"] if p["role"] == "model" else f"\n{render_result(p['text'])}\n" for p in row["response"])


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---- GSM8K -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_gsm8k_rows_convert_and_every_executed_result_equals_its_annotation(tmp_path, every):
    rows = {row["id"]: row for row in read(data("math", "gsm8k_train_1000.jsonl"))[::every]}
    report, made = convert(tmp_path, *rows.values())
    assert report["rows"] == len(rows) == 1000 // every and report["converted"] == len(made) >= 0.99 * len(rows)
    assert {row["id"] for row in made} | {row["id"] for row in report["skipped"]} == set(rows)
    assert {row["reason"] for row in report["skipped"]} <= {"no calculator annotation"}
    assert json.loads((tmp_path / "d.report.json").read_text()) == report
    for row in made:
        annotations = re.findall(r"<<[^<>]*=([^<>=]*)>>", rows[row["id"]]["solution"])
        printed = row["response"][1]["text"].split()
        assert len(printed) == len(annotations)
        assert all(math.isclose(float(a), float(b), rel_tol=1e-9) for a, b in zip(printed, annotations)), row["id"]
        assert well_formed(text_of(row), "tags", "math"), row["id"]
        assert row["response"][-1]["text"].endswith(f"\\boxed{{{rows[row['id']]['answer']}}}.</answer>")
        assert "<<" not in text_of(row)


CLIPS = {
    "id": "clips",
    "question": "Natalia sold clips to 48 friends in April, and half as many in May. How many in all?",
    "answer": "72",
    "solution": "She sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips.\nThat is 72.",
}


def convert(tmp_path, *rows):
    source = write(tmp_path / "in.jsonl", *rows)
    report = prepare_gsm8k.main(prepare_gsm8k.Args(input=source, output=str(tmp_path / "d.jsonl")))
    return report, read(tmp_path / "d.jsonl")


def test_gsm8k_demonstration_word_for_word(tmp_path):
    _, [row] = convert(tmp_path, CLIPS)
    assert row["response"] == [
        {
            "role": "model",
            "text": "<think>She sold 48/2 = s1 clips in May.\nShe sold 48+s1 = s2 clips.</think>\n"
            '<python>\ns1 = 48/2\ns2 = 48+s1\nprint(s1, s2, sep="\\n")\n</python>',
        },
        {"role": "tool", "name": "python", "text": row["response"][1]["text"]},
        {
            "role": "model",
            "text": "<think>She sold 48+24 = 72 clips.\nThat is 72.</think>\n"
            "<answer>The answer is \\boxed{72}.</answer>",
        },
    ]
    assert row["response"][1]["text"].split() == ["24.0", "72.0"]
    assert (row["id"], row["answer"], row["task"]) == ("clips", "72", "math")


def test_gsm8k_skips_with_a_reason(tmp_path):
    report, made = convert(
        tmp_path,
        CLIPS | {"id": "wrong", "solution": "It is <<48/2=25>>25."},
        CLIPS | {"id": "none", "solution": "It is 24."},
        CLIPS | {"id": "words", "solution": "It is <<__import__('os')=25>>25."},
        CLIPS | {"id": "zero", "solution": "It is <<1/0=25>>25."},
        CLIPS | {"id": "open", "solution": "It is <<1+1=2>>2 and <<2+2."},
        CLIPS | {"id": "good"},
    )
    reasons = {row["id"]: row["reason"] for row in report["skipped"]}
    assert [row["id"] for row in made] == ["good"]
    assert set(reasons) == {"wrong", "none", "words", "zero", "open"}
    assert "24" in reasons["wrong"] and "division" in reasons["zero"] and "arithmetic" in reasons["words"]


def test_operands_are_taken_from_the_question_as_often_as_they_stand_there():
    name = prepare_gsm8k.name_operands
    # 15 is given once and used once (15*5); the next 15 is the second result.
    assert name("15 balls for $5, 20% more", [("15*5", "75"), ("75*.2", "15"), ("75+15", "90")]) == [
        "15*5",
        "s1*.2",
        "s1+s2",
    ]
    assert name("twice 8", [("8*2", "16"), ("16/2", "8")]) == ["8*2", "s1/2"]
    assert name("no numbers", [("2+2", "4"), ("4.0*1.4", "5.6")]) == ["2+2", "s1*1.4"]


def test_gsm8k_reads_the_original_rows_and_writes_questions(tmp_path):
    original = {"question": "How many?", "answer": "It is 500*2 = <<500*2=1000>>1,000.\n#### 1,000"}
    report, [row] = convert(tmp_path, original)
    assert row["answer"] == "1000" and row["response"][1]["text"].split() == ["1000"]
    assert row["response"][0]["text"].startswith("<think>It is 500*2 = s1.</think>")
    source = data("math", "gsm8k_test.jsonl")
    prepare_gsm8k.main(prepare_gsm8k.Args(input=source, questions=str(tmp_path / "q.jsonl")))
    questions = load_questions(str(tmp_path / "q.jsonl"))
    assert len(questions) == 150 and {q.task for q in questions} == {"math"}
    assert [q.gold for q in questions] == [r["answer"] for r in read(source)]


@pytest.mark.parametrize(
    "row, message", [({"question": "q", "answer": ""}, "'solution'"), ({"answer": "1"}, "'question'")]
)
def test_gsm8k_names_the_bad_row(tmp_path, row, message):
    source = write(tmp_path / "in.jsonl", CLIPS, row)
    with pytest.raises(DataError, match=f"in.jsonl:2: .*{message}"):
        prepare_gsm8k.main(prepare_gsm8k.Args(input=source, questions=str(tmp_path / "q.jsonl")))


def test_command_line_ends_with_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "data.prepare_gsm8k", "--input", str(tmp_path / "no.jsonl"), "--questions", "q"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no such file" in done.stderr and done.stderr.count("\n") == 1


# ---- multi-hop -------------------------------------------------------------------------------------------------------


def test_multihop_results_are_what_the_index_returns(tmp_path):
    source, corpus = data("retrieval", "questions.jsonl"), data("retrieval", "corpus.jsonl")
    paths = {"index": str(tmp_path / "i"), "output": str(tmp_path / "d.jsonl"), "questions": str(tmp_path / "q.jsonl")}
    report = prepare_multihop.main(prepare_multihop.Args(input=source, corpus=corpus, **paths))
    made, rows, index = read(paths["output"]), {r["qid"]: r for r in read(source)}, SearchIndex.load(paths["index"])
    held_out = load_questions(paths["questions"])
    assert len(held_out) == 100 and {q.task for q in held_out} == {"qa"}
    assert {q.meta["family"] for q in held_out} == {"musique", "hotpotqa", "2wiki"}
    assert not {q.id for q in held_out} & {row["id"] for row in made}
    assert report["converted"] == len(made) >= 50
    assert len(made) + len(report["skipped"]) + 100 == len(rows) == 384
    for row in made:
        hops = rows[row["id"]]["hops"]
        calls = parse_calls(text_of(row))
        results = [part["text"] for part in row["response"] if part["role"] == "tool"]
        assert len(calls) == len(results) == len(hops)
        for hop, call, result in zip(hops, calls, results):
            found = index.search(call.arguments, 4)
            assert result == render(found, 1200)
            assert hop["gold_passage_id"] in [passage["id"] for passage in found]
            assert hop["answer"].lower() in result.lower()
        assert well_formed(text_of(row), "tags", "qa"), row["id"]
        assert row["response"][-1]["text"].endswith(f"<answer>{row['answer'][0]}</answer>")


MUSIQUE = {
    "id": "2hop__1_2",
    "question": "Where was the author of Blue Hill born?",
    "answer": "Lindau",
    "answer_aliases": ["Lindau, Bodensee"],
    "paragraphs": [
        {"idx": 0, "title": "Blue Hill", "paragraph_text": "Blue Hill is a novel by Ada Moor.", "is_supporting": True},
        {
            "idx": 1,
            "title": "Ada Moor",
            "paragraph_text": "Ada Moor, born in Lindau, wrote novels.",
            "is_supporting": True,
        },
        {"idx": 2, "title": "Hill", "paragraph_text": "A hill is a landform.", "is_supporting": False},
    ],
    "question_decomposition": [
        {"id": 1, "question": "Blue Hill >> author", "answer": "Ada Moor", "paragraph_support_idx": 0},
        {"id": 2, "question": "Where was #1 born ?", "answer": "Lindau", "paragraph_support_idx": 1},
    ],
}


def test_musique_rows_bring_their_passages(tmp_path):
    args = {"index": str(tmp_path / "i"), "output": str(tmp_path / "d.jsonl"), "search_top_k": 1}
    source = write(tmp_path / "in.jsonl", MUSIQUE, MUSIQUE | {"id": "again"})
    prepare_multihop.main(prepare_multihop.Args(input=source, **args))
    first, second = read(args["output"])
    assert len(SearchIndex.load(args["index"]).passages) == 3  # shared paragraphs are indexed once
    assert first["answer"] == ["Lindau", "Lindau, Bodensee"] and first["response"] == second["response"]
    assert [part["text"] for part in first["response"]] == [
        "<think>I need to know: author of Blue Hill</think>\n<search>Blue Hill author</search>",
        "Blue Hill\nBlue Hill is a novel by Ada Moor.",
        "<think>Ada Moor, say the results. I need to know: Where was Ada Moor born?</think>\n"
        "<search>Where was Ada Moor born?</search>",
        "Ada Moor\nAda Moor, born in Lindau, wrote novels.",
        "<think>Lindau, say the results. That answers the question.</think>\n<answer>Lindau</answer>",
    ]


def test_a_hop_without_its_passage_is_skipped_or_owned_up_to(tmp_path):
    lost = json.loads(json.dumps(MUSIQUE))
    lost["paragraphs"][0]["paragraph_text"], lost["paragraphs"][0]["title"] = "nothing", "nothing"
    args = {
        "input": write(tmp_path / "in.jsonl", lost),
        "index": str(tmp_path / "i"),
        "output": str(tmp_path / "d.jsonl"),
    }
    report = prepare_multihop.main(prepare_multihop.Args(**args, search_top_k=1))
    assert report["converted"] == 0 and "gold passage not found: hop 1" in report["skipped"][0]["reason"]
    assert prepare_multihop.main(prepare_multihop.Args(**args, search_top_k=1, keep="all"))["converted"] == 1
    assert "The results do not say it; I remember Ada Moor." in read(args["output"])[0]["response"][2]["text"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question": ""}, "'question'"),
        ({"answer": None, "answer_aliases": None, "question_decomposition": [{"question": "a"}]}, "missing field"),
        ({"question_decomposition": [{"question": "#1 x", "answer": "a", "paragraph_support_idx": 0}]}, "hop 1 refers"),
        (
            {"question_decomposition": [{"question": "x", "answer": "", "paragraph_support_idx": 0}]},
            "hop 1 has no 'answer'",
        ),
        ({"id": "2hop__1_2"}, "duplicate id"),
    ],
)
def test_multihop_names_the_bad_row(tmp_path, change, message):
    source = write(tmp_path / "in.jsonl", MUSIQUE, MUSIQUE | {"id": "other"} | change)
    with pytest.raises(DataError, match=f"in.jsonl:2: .*{message}"):
        prepare_multihop.main(
            prepare_multihop.Args(input=source, index=str(tmp_path / "i"), output=str(tmp_path / "d"))
        )
