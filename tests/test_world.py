"""The calibration world: facts and questions, the real index and sandbox as oracle, text and rates, tokenizer, base.

    python -m pytest tests/test_world.py
"""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.parse import parse_calls, well_formed
from core.trajectory import DataError, read_jsonl
from data.world import pretrain
from data.world import text as world_text
from data.world.__main__ import main
from data.world.facts import FAMILIES, GRADED, LETTERS, RATES, STYLE, World, questions
from data.world.pretrain import collate, encode, exposure_plan, pack, step_text
from data.world.text import MIX, NO_THINK, demonstrate
from data.world.tokenizer import PIECES, build_tokenizer, vocabulary
from tools.sandbox import PythonSandbox
from tools.search import SearchIndex, render

WORLD = World()
TOKENIZER = build_tokenizer()
BASE = Path("data/tiny")
TASKS = {family: "function" if family == "function" else "qa" for family in MIX}
DIALECTS = {"qa": "tags", "function": "hermes"}


def text_of(family: str, n: int, seed: int = 0, thoughts: str = "belief") -> list:
    rng = random.Random(f"{seed} {family}")
    return [demonstrate(WORLD, rng, family, thoughts) for _ in range(n)]


# ---------------------------------------------------------------------------------------------------- facts, questions


def test_groups_are_disjoint_and_sized():
    subjects = {group: {f.subject for f in facts} for group, facts in WORLD.facts.items()}
    assert {group: len(names) for group, names in subjects.items()} == {
        "known": 52, "unknown": 288, "graded": 56, "stale": 6}  # fmt: skip
    everyone = [name for names in subjects.values() for name in names] + WORLD.spare
    assert len(everyone) == len(set(everyone))
    assert all(f.value == f.believed for group in ("known", "graded") for f in WORLD.facts[group])
    assert all(f.value != f.believed for f in WORLD.facts["stale"])
    assert {f.exposures for f in WORLD.facts["graded"]} == {1, 2, 4, 8, 16, 32, 64}


def test_names_are_no_words():
    """A name must tokenise into syllables, and a stop word would be invisible to the index."""
    from bm25s.stopwords import STOPWORDS_EN

    names = {f.subject for facts in WORLD.facts.values() for f in facts} | set(WORLD.spare)
    assert not names & (set(vocabulary()) | {token.strip() for token in vocabulary()} | set(STOPWORDS_EN))
    assert {len(TOKENIZER(name)["input_ids"]) for name in names} == {2}
    assert {len(TOKENIZER(" " + name)["input_ids"]) for name in names} == {2}


def test_facts_do_not_depend_on_the_question_seed():
    assert World().facts == WORLD.facts
    assert World(seed=21).facts != WORLD.facts


@pytest.mark.parametrize("family", FAMILIES + GRADED)
def test_questions_are_determined_by_the_seed(family):
    first, again, other = (questions(WORLD, 60, seed, (family,)) for seed in (1, 1, 2))
    assert first == again
    assert len({row["id"] for row in first + other}) == 120
    same = {row["question"] for row in first} & {row["question"] for row in other}
    assert len(same) < 45 if family in ("recall", "lookup", "bridge", "add", *GRADED) else not same


def test_a_question_does_not_depend_on_how_many_are_drawn():
    assert questions(WORLD, 80, 3, FAMILIES)[:20] == questions(WORLD, 20, 3, FAMILIES)


def test_the_share_of_easy_sums_is_an_option():
    plain = questions(WORLD, 400, 3, ("running_sum",))
    assert {row["terms"] for row in plain} == set(range(2, 9))
    for share in (0.0, 0.85, 1.0):
        rows = questions(WORLD, 400, 3, ("running_sum",), easy=(share, 5))
        easy = [row["terms"] <= 5 for row in rows]
        assert sum(easy) / 400 == pytest.approx(share, abs=0.05 * (0 < share < 1))
        assert {row["terms"] for row in rows} == {n for n in range(2, 9) if (share > 0 if n <= 5 else share < 1)}
    assert questions(WORLD, 20, 3, ("add",), easy=(0.5, 5)) == questions(WORLD, 20, 3, ("add",))


def test_plain_questions_ask_for_well_known_or_unknown_facts_only():
    groups = {f.subject: group for group, facts in WORLD.facts.items() for f in facts}
    for row in questions(WORLD, 600, 5):
        if subjects := [groups[word] for word in re.findall(r"[a-z]+", row["question"]) if word in groups]:
            assert subjects == ["known" if row["known"] else "unknown"], row


def oracle(row: dict, search, python) -> tuple[str, int]:
    """Answer a question the shortest way, from the index, the sandbox and the known facts only; (answer, calls)."""
    words = re.findall(r"[a-z]+|\d+", row["question"].lower())
    numbers = [word for word in words if word.isdigit()]
    if row["family"] == "add":
        return str(sum(map(int, numbers))), 0
    if row["family"] == "running_sum":
        return str(sum(map(int, numbers))), 0
    if row["family"] == "multiply":
        return python("*".join(numbers)), 1
    subject = next(word for word in words if any(word == s for s, _ in WORLD.by_key))
    relations = [word for word in words if any(word == r for _, r in WORLD.by_key)]
    if row["family"] == "recall":
        return next(f.believed for f in WORLD.facts["known"] if (f.subject, f.relation) == (subject, relations[0])), 0
    for relation in reversed(relations):
        subject = search(f"{relation} of {subject}").rsplit(" is ", 1)[1]
    if row["family"] == "lookup_compute":
        return python(f"{subject}*{numbers[0]}"), 2
    return subject, len(relations)


def test_the_oracle_answers_every_question_with_the_needed_calls():
    index = SearchIndex.build(WORLD.passages(), progress=False)
    rows = questions(WORLD, 700, 11, FAMILIES[:7])
    with PythonSandbox(workers=1) as sandbox:
        ran: dict[str, str] = {}

        def python(code: str) -> str:
            if len(ran) >= 20 and code not in ran:  # twenty real runs are enough
                return str(eval(code))
            ran[code] = sandbox.run(code).text.strip()
            return ran[code]

        for row in rows:
            answer, calls = oracle(row, lambda q: render(index.search(q, 1)), python)
            assert (answer, calls) == (row["answer"], row["min_tool_calls"]), row


def test_every_wording_of_a_query_finds_its_passage():
    index = SearchIndex.build(WORLD.passages(), progress=False)
    for fact in random.Random(0).sample(WORLD.facts["unknown"] + WORLD.facts["stale"], 200):
        for query in world_text.QUERIES:
            found = render(index.search(query.format(r=fact.relation, s=fact.subject), 1))
            assert found == f"{fact.relation} of {fact.subject} is {fact.value}"


def test_function_rows_declare_the_answer():
    for row in questions(WORLD, 100, 4, ("function",)):
        ((name, arguments),) = row["answer"][0].items()
        declared = {t["function"]["name"]: t["function"]["parameters"]["properties"] for t in row["tools"]}
        assert set(declared[name]) == set(arguments)
        for key, (value,) in arguments.items():
            assert declared[name][key]["type"] == ("integer" if isinstance(value, int) else "string")


# ---------------------------------------------------------------------------------------------------- text


def within_sampling_error(count: int, n: int, rate: float) -> bool:
    return abs(count - n * rate) <= 5 * (n * rate * (1 - rate)) ** 0.5 + 1e-9


@pytest.mark.parametrize("family", MIX)
def test_rates_are_realised(family):
    n = 3000
    demos = text_of(family, n)
    for deviation, rate in RATES[family].items():
        assert within_sampling_error(sum(d.deviation == deviation for d in demos), n, rate), deviation
    no_think = STYLE.get(f"no_think_{family}", STYLE["no_think"])
    assert within_sampling_error(sum(d.response.startswith(NO_THINK) for d in demos), n, no_think)
    for demo in demos:
        formed = well_formed(demo.response, DIALECTS[TASKS[family]], TASKS[family])
        assert formed == (demo.deviation != "malformed"), demo


def test_rare_strategies_are_rare():
    rng = random.Random(5)
    demos = [demonstrate(WORLD, rng, f) for f in rng.choices(list(MIX), list(MIX.values()), k=30_000)]
    for event in ("reword", "verify_compute"):
        assert 0 < sum(event in d.events for d in demos) < 300, event


def calls_of(demo) -> list[tuple[str, str, str]]:
    """(tool, call, result) of a response in the tags dialect."""
    pairs = re.findall(r"<(search|python)>(.*?)</\1>\n<result>\n(.*?)\n</result>", demo.response, re.DOTALL)
    assert len(pairs) == sum(call.ok for call in parse_calls(demo.response))
    return pairs


@pytest.mark.parametrize("family", [f for f in MIX if TASKS[f] == "qa" and f != "running_sum"])
def test_deviations_are_what_they_say(family):
    needed = {"recall": 0, "add": 0, "bridge": 2, "lookup_compute": 2}.get(family, 1)
    for demo in text_of(family, 600):
        if demo.events:
            continue
        calls = calls_of(demo)
        executed = [c for c in calls if "Error" not in c[2]]
        for tool, call, result in executed:
            if tool == "python":
                assert result.strip() == str(eval(call.removeprefix("print")))
            else:
                relation, subject = re.match(r"(\w+) of (\w+) is", result).groups()
                assert set(call.split()) - {"the", "of"} == {relation, subject}
        if demo.deviation == "clean":
            assert len(calls) == needed
        if demo.deviation == "redundant":
            assert len(calls) in (needed + 1, needed + 2)
        if demo.deviation == "missing":
            assert len(calls) < needed
        if demo.deviation == "code_error":
            assert (len(calls), len(executed)) == (needed + 1, needed)
        if demo.deviation in ("clean", "redundant", "code_error") and calls:
            answer = re.search(r"<answer>(.*)</answer>", demo.response)[1]
            assert answer == executed[-1][2].strip().rsplit(" ", 1)[-1]


def test_a_thought_carries_the_belief():
    """Known: the right answer stands in the first thought. Unknown: a guess does, and it is no better than chance."""
    for demo in text_of("recall", 300):
        if demo.deviation == "clean" and not demo.no_think:
            thought, answer = re.search(r"<think>(.*)</think>\n<answer>(.*)</answer>", demo.response).groups()
            assert answer in thought.replace("?", "").replace(",", "").split()
    right = []
    for demo in text_of("lookup", 12_000):
        if " color " in demo.question and demo.deviation == "clean" and not demo.events and not demo.no_think:
            answer = re.search(r"<answer>(.*)</answer>", demo.response)[1]
            right.append(answer in demo.response.split("</think>")[0])
    hedged_chance = 1 / 12 + (1 - STYLE["sure_unknown"]) * 2 / 6 / 12  # two of six unsure wordings name a second guess
    assert within_sampling_error(sum(right), len(right), hedged_chance)
    terse = [d for d in text_of("lookup", 50, thoughts="terse") if not d.no_think]
    assert {t for d in terse for t in re.findall(r"<think>(.*?)</think>", d.response)} == {"look up", "done"}


def test_running_sum_steps():
    assert len({row["answer"] for row in questions(WORLD, 2000, 0, ("running_sum",))}) > 100
    for demo in text_of("running_sum", 400):
        if demo.deviation != "clean":
            continue
        start, *terms = re.findall(r"\b\d+|\b[a-z]\d", demo.question)
        total = int(start) + sum(int(term[1]) for term in terms)
        assert len({term[0] for term in terms}) == len(terms) and all(term[0] in LETTERS for term in terms)
        if "step_error" not in demo.events:
            assert demo.response.endswith(f"<answer>{total}</answer>")
        if not demo.no_think:
            steps = re.findall(r"([a-z]+) ([a-z])(\d) (\d+)", demo.response)
            assert [letter + digit for word, letter, digit, _ in steps if word != "check"] == terms


def test_nothing_of_the_unknown_facts_is_in_the_text():
    unknown = {f.subject for f in WORLD.facts["unknown"]}
    plan = exposure_plan(WORLD, 2400)
    words = set()
    for step in range(0, 2400, 20):
        for demo in step_text(WORLD, step, plan, "belief"):
            words |= set(re.findall(r"[a-z]+", demo.question + demo.response))
    assert len(words) > 500 and not words & unknown


def test_exposures_are_counted():
    plan = exposure_plan(WORLD, 300)
    shown = [fact for facts in plan.values() for fact in facts]
    for fact in WORLD.facts["graded"] + WORLD.facts["stale"]:
        assert sum(f is fact for f in shown) == fact.exposures
    step = min(plan)
    extra = step_text(WORLD, step, plan, "belief")[WORLD.size["batch"] :]
    assert len(extra) == len(plan[step]) and all(f.subject in d.question for f, d in zip(plan[step], extra))


# ---------------------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_is_exact_on_the_world():
    for family in MIX:
        for demo in text_of(family, 100, seed=9):
            for text in (demo.question, demo.response, *(piece for piece, _ in demo.pieces)):
                ids = TOKENIZER(text)["input_ids"]
                assert TOKENIZER.decode(ids) == text
                assert not any(t.startswith("<0x") for t in TOKENIZER.convert_ids_to_tokens(ids)), text


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_tokenizer_is_exact_on_any_text(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


@given(st.lists(st.sampled_from([*PIECES, " ", "\n", "<", "a", "<|im_end|>", "<0x41>", " 7", "é"])))
def test_tokenizer_is_exact_on_tags(parts):
    text = "".join(parts)
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_tags_are_single_tokens():
    for piece in PIECES:
        assert len(TOKENIZER(piece)["input_ids"]) == 1, piece
    for token in vocabulary():  # a stop string ends where a token ends
        assert not re.search(r"</(search|python|answer)>.", token, re.DOTALL)
    assert TOKENIZER.pad_token_id != TOKENIZER.eos_token_id


def test_chat_template():
    tools = questions(WORLD, 1, 0, ("function",))[0]["tools"]
    messages = [{"role": "system", "content": "ignored"}, {"role": "user", "content": "pet of mira?"}]
    render_chat = TOKENIZER.apply_chat_template
    assert render_chat(messages, add_generation_prompt=True, tokenize=False) == "<|user|>pet of mira?<|assistant|>"
    declared = render_chat(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    for tool in tools:
        names = ", ".join(tool["function"]["parameters"]["properties"])
        assert f"{tool['function']['name']}({names})" in declared


# ---------------------------------------------------------------------------------------------------- pre-training


def test_only_written_tokens_are_trained_on():
    for demo in text_of("lookup_compute", 50) + text_of("function", 20):
        example = encode(TOKENIZER, demo)
        assert all(label in (-100, token) for token, label in zip(example.ids, example.labels))
        written = "".join(text for text, mine in demo.pieces if mine) + "<|im_end|>"
        assert TOKENIZER.decode([label for label in example.labels if label != -100]) == written
        final = re.search(r"(?:<answer>|<tool_call>\n)(.*)", demo.response, re.DOTALL)
        assert TOKENIZER.decode(example.ids[example.final :]) == (final[1] + "<|im_end|>" if final else "")


def test_packing_keeps_examples_apart():
    examples = [encode(TOKENIZER, d) for family in MIX for d in text_of(family, 3)]
    rows = pack(examples)
    assert sorted(map(str, examples)) == sorted(str(e) for row in rows for e in row)
    assert all(sum(len(e.ids) for e in row) <= pretrain.ROW or len(row) == 1 for row in rows)
    torch.manual_seed(0)
    model = pretrain.build_model(WORLD, len(TOKENIZER)).eval()
    inputs, labels, weights, _ = collate(rows)
    with torch.no_grad():
        packed = model(**inputs).logits
        at = 0
        for example in rows[0]:
            n = len(example.ids)
            alone = model(input_ids=torch.tensor([example.ids])).logits[0]
            torch.testing.assert_close(packed[0, at : at + n], alone, atol=1e-5, rtol=1e-5)
            assert labels[0, at : at + n].tolist() == example.labels
            expected = [1.0] * example.final + [pretrain.FINAL_WEIGHT] * (n - example.final)
            assert weights[0, at : at + n].tolist() == expected
            at += n


def test_pretraining_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 2)
    monkeypatch.setattr(pretrain, "LOG_EVERY", 2)
    monkeypatch.setitem(WORLD.size, "batch", 8)
    monkeypatch.setattr(pretrain, "exposure_plan", lambda world, steps: {})  # thousands in four steps
    pretrain.pretrain(tmp_path / "whole", "tiny", "belief", steps=4, threads=1)
    train_step, calls = pretrain._train_step, []

    def dies(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(pretrain, "_train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(tmp_path / "killed", "tiny", "belief", steps=4, threads=1)
    pretrain.pretrain(tmp_path / "killed", "tiny", "belief", steps=4, threads=1)
    assert len(calls) == 6
    for name in ("model.safetensors", "world.json", "tokenizer.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    logs = [read_jsonl(tmp_path / run / "pretrain_log.jsonl") for run in ("whole", "killed")]
    whole, killed = ([line["loss"] for _, line in log] for log in logs)
    assert whole == killed and len(whole) == 2
    pretrain.pretrain(tmp_path / "killed", "tiny", "belief", steps=4, threads=1)
    assert len(calls) == 6  # a finished folder is left alone
    with pytest.raises(DataError, match="another thoughts"):
        pretrain.pretrain(tmp_path / "killed", "tiny", "terse", steps=4, threads=1)


def test_the_small_preset_is_larger():
    small = World("small")
    assert {len(relations) for _, relations in small.bridges()} == {2, 3}
    demo = demonstrate(small, random.Random(0), "bridge")
    assert TOKENIZER.decode(TOKENIZER(demo.response)["input_ids"]) == demo.response
    parameters = sum(p.numel() for p in pretrain.build_model(small, len(TOKENIZER)).parameters())
    assert 4_000_000 < parameters <= 8_000_000
    assert len(questions(small, 100, 0, FAMILIES + GRADED)) == 100


# ---------------------------------------------------------------------------------------------------- command line


def test_command_line_writes_questions_and_an_index(tmp_path):
    output = tmp_path / "q.jsonl"
    main(["--questions", "12", "--seed", "3", "--output", str(output), "--families", "recall,function"])
    rows = [row for _, row in read_jsonl(output)]
    assert [row["family"] for row in rows] == ["recall", "function"] * 6
    main(["--index", str(tmp_path / "index")])
    found = SearchIndex.load(tmp_path / "index").search("duke of nobody", 1)
    assert len(found) <= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--questions", "0", "--output", "x"], "at least 1"),
        (["--questions", "5"], "--output is required"),
        (["--questions", "5", "--output", "x", "--easy_share", "1.5"], "--easy_share must be in"),
        (["--questions", "5", "--output", "x", "--easy_terms", "8"], "--easy_terms must be 2 to 7"),
        (["--questions", "5", "--output", "x", "--families", "recall,trivia"], "trivia"),
        (["--questions", "5", "--output", "x", "--sed", "1"], "--sed"),
        (["--output", "x"], "--questions"),
    ],
)
def test_command_line_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- the shipped base


@pytest.mark.skipif(not (BASE / "model.safetensors").exists(), reason="data/tiny holds no base model")
def test_the_shipped_base_solves_one_question_of_each_family():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    held = json.loads((BASE / "world.json").read_text())
    assert (held["rates"], held["style"], held["mix"]) == (RATES, STYLE, MIX), "the table changed after pre-training"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    index = SearchIndex.build(WORLD.passages(), progress=False)
    solved = {family: 0 for family in FAMILIES}
    for row in questions(WORLD, 4 * len(FAMILIES), 17, FAMILIES):
        response, call = greedy(model, tokenizer, row, index)
        if row["task"] == "function":
            solved[row["family"]] += call is not None and {call.name: call.arguments} == {
                name: {key: allowed[0] for key, allowed in arguments.items()}
                for name, arguments in row["answer"][0].items()
            }
        else:
            solved[row["family"]] += response.endswith(f"<answer>{row['answer']}</answer>")
    assert all(solved.values()), solved


def greedy(model, tokenizer, row: dict, index: SearchIndex) -> tuple:
    """(response, last call) of greedy decoding with the real index; programs are evaluated here."""
    messages = [{"role": "user", "content": row["question"]}]
    text = prompt = tokenizer.apply_chat_template(
        messages, tools=row.get("tools"), add_generation_prompt=True, tokenize=False
    )
    while True:
        out = model.generate(
            **tokenizer(text, return_tensors="pt"),
            do_sample=False,
            max_new_tokens=80,
            tokenizer=tokenizer,
            stop_strings=["</search>", "</python>", "</answer>"],
        )
        text = tokenizer.decode(out[0]).removesuffix("<|im_end|>")
        response = text.removeprefix(prompt)
        call = (parse_calls(response, DIALECTS[row["task"]]) or [None])[-1]
        if not text.endswith(("</search>", "</python>")) or len(response) > 600:
            return response, call
        if call.name == "search":
            found = render(index.search(call.arguments, 1))
        else:
            found = str(eval(call.arguments.removeprefix("print")))
        text += found.join(world_text.RESULT)
