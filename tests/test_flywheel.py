"""Flywheel: operators on canned trajectories, critics, rounds with a scripted model, kills, Pareto selection.

    python -m pytest tests/test_flywheel.py
"""

import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from statistics import pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ScriptedModel, byte_tokenizer, family_tokenizer
from tqdm import tqdm

import flywheel
import train_sft
from core import conversation
from core.model import load_tokenizer
from core.parse import well_formed
from core.trajectory import DataError, Question, load_trajectories
from data.questions import load_questions, question_of
from methods import critics, operators, selection
from rollout import RolloutArgs, rollout
from tools.sandbox import ToolResult

FIRST = "<think>maybe ann, look up</think>\n<search>author of x</search>"
AGAIN = "<think>so ann, once more</think>\n<search>author of x</search>"
LAST = "<think>ann again</think>\n<answer>ann</answer>"
RESULT = "\n<result>\nthe author of x is ann\n</result>\n"
TOOLBOX = {"search": lambda query: ToolResult(f"the {query} is ann", True, None, time.perf_counter() % 1)}
PLAIN = byte_tokenizer()


def question(i="q", task="qa", **meta):
    return Question(i, "who wrote x?", "ann" if task == "qa" else "2", task, meta=meta)


def by_bytes(text):
    return PLAIN(text, add_special_tokens=False)["input_ids"]


def sampled(turns, q=None, tokenizer=PLAIN, dialect="tags", toolbox=TOOLBOX, **flags):
    """A trajectory that wrote turns[k] after k results, with ids that are not always the tokenizer's own choice."""
    close = "</result>" if dialect == "tags" else "</tool_response>"
    model = ScriptedModel(tokenizer, lambda response: turns[response.count(close)], by_bytes)
    args = RolloutArgs(num_generations=1, dialect=dialect, **flags)
    return rollout(model, tokenizer, [q or question()], args, toolbox, (0,))[0]


def edit(name, t, finding, q=None, tokenizer=PLAIN):
    return operators.OPERATORS[name].edit(t, q or question(), finding, tokenizer, random.Random(0))


def written(draft):
    """(who wrote it, text) of every segment after the prompt."""
    return [(who, text) for who, _, _, text in draft.segments]


# ---------------------------------------------------------------------------------------------------- operators


def test_steps_and_thoughts_are_what_the_model_wrote_between_results():
    t = sampled([FIRST, AGAIN, LAST])
    steps = operators.steps_of(t, PLAIN)
    assert [s.text for s in steps] == [FIRST, AGAIN, LAST] and [s.calls for s in steps] == [1, 1, 0]
    thoughts = [(thought.step, thought.text) for thought in operators.thoughts_of(t, steps)]
    assert thoughts == [(0, "maybe ann, look up"), (1, "so ann, once more"), (2, "ann again")]
    broken = replace(t, tool_calls=t.tool_calls[:1])
    assert operators.steps_of(broken, PLAIN) == []
    assert all(edit(name, broken, operators.Finding(0, "")) == [] for name in ("self_correction", "hint_injection"))


def test_redundant_modification_keeps_ids_and_trains_on_the_edit():
    tokenizer = byte_tokenizer(extra=["author", "maybe"])  # the samples spell these byte by byte
    t = sampled([FIRST, AGAIN, LAST], tokenizer=tokenizer)
    finding = operators.Finding(1, "<think>so ann, the author</think>")
    (draft,) = edit("redundant_modification", t, finding, tokenizer=tokenizer)
    steps = operators.steps_of(t, tokenizer)
    kept = steps[1].start
    assert draft.ids[:kept] == t.token_ids[:kept] and draft.mask[:kept] == t.loss_mask[:kept]
    assert draft.ids[kept:] == tokenizer("<think>so ann, the author</think>\n")["input_ids"]
    assert draft.mask[kept:] == [1] * (len(draft.ids) - kept)
    assert written(draft) == [("model", FIRST), ("tool", RESULT), ("model", "<think>so ann, the author</think>\n")]
    assert not draft.sampled and draft.finish is None and draft.calls == t.tool_calls[:1]
    assert draft.calls[0] is not t.tool_calls[0]


def test_self_correction_without_text_resamples_from_the_cut():
    t = sampled([FIRST, AGAIN, LAST])
    (draft,) = edit("self_correction", t, operators.Finding(0, ""))
    assert draft.ids == t.token_ids[: t.prompt_len] and draft.calls == [] and draft.seed != 0
    (other,) = operators.replace_step(t, question(), operators.Finding(0, ""), PLAIN, random.Random(1))
    assert other.seed != draft.seed
    assert edit("self_correction", t, None) == []


@pytest.mark.parametrize(
    "operator, text, kept",
    [
        ("redundant_modification", "<think>ann</think>", [("model", "ann</think>\n")]),
        ("self_correction", "", []),
        ("hint_injection", "", [("model", None), ("tool", None), ("given", None)]),  # behind the flawed step
    ],
)
def test_an_edited_step_opens_as_the_template_opens_it(operator, text, kept):
    tokenizer = family_tokenizer("qwen3-thinking")
    t = sampled(["so</think>" + FIRST.partition("</think>")[2], LAST], tokenizer=tokenizer)
    draft = edit(operator, t, operators.Finding(0, text), tokenizer=tokenizer)[0]
    assert draft.ids[: t.prompt_len] == t.token_ids[: t.prompt_len] and written(draft)[0] == ("given", "<think>\n")
    assert [(who, text if kept[0][1] else None) for who, text in written(draft)[1:]] == kept
    thoughts = 2 if operator == "hint_injection" else 1  # with tags the template opens the first turn only
    assert sum(piece.count("<think>") for _, piece in written(draft)) == thoughts
    later = edit("self_correction", t, operators.Finding(1, ""), tokenizer=tokenizer)[0]  # with tags: no second opening
    assert written(later)[-1][0] == "tool"


def test_hints_stand_in_a_thought_and_are_not_trained_on():
    t = sampled([FIRST, AGAIN, "<think>bob</think>\n<answer>bob</answer>"])
    at_step, at_end = edit("hint_injection", t, operators.Finding(0, "not used"))
    hint = written(at_step)[-1]
    assert hint[0] == "given" and hint[1].startswith("<think>") and hint[1][7:] in operators.HINTS["qa"]
    assert written(at_step)[:-1] == [("model", FIRST), ("tool", RESULT)]  # the flawed step stays, with its result
    assert at_step.calls == t.tool_calls[:1]
    t = sampled([FIRST, "<think>bob</think>\n<answer>bob</answer>"])
    (at_end,) = edit("hint_injection", t, operators.Finding(1, "not used"))  # behind the last step: before its answer
    assert written(at_end)[2] == ("model", "<think>bob")
    who, text = written(at_end)[3]
    assert who == "given" and text.startswith(", ") and text[2:] in operators.HINTS["qa"]
    n = len(text)
    assert at_end.mask[-n:] == [0] * n and at_end.mask[-n - 1] == 1
    assert len(edit("hint_injection", t, None)) == 1  # no flawed step found: only before the answer


@pytest.mark.parametrize("extra", [[], ["<think>\n\n</think>\n\n"]])
def test_a_hint_fills_an_empty_thought_even_if_it_is_one_token(extra):
    tokenizer = byte_tokenizer(extra)
    text = "<think>\n\n</think>\n\n<answer>bob</answer>"
    model = ScriptedModel(tokenizer, lambda response: text)
    t = rollout(model, tokenizer, [question()], RolloutArgs(num_generations=1), {}, (0,))[0]
    assert t.mode == "no_think"
    ((who, hint),) = written(edit("hint_injection", t, None, tokenizer=tokenizer)[0])
    assert who == "given" and hint.startswith("<think>") and conversation.mode_of(hint + "</think>") == "think"


def test_no_hint_before_an_answer_that_never_came():
    t = sampled(["<think>" + "x" * 99], max_completion_length=40)
    assert t.finish == "length" and edit("hint_injection", t, None) == []
    t = sampled([FIRST, FIRST], max_tool_calling_iterations=1)
    assert t.finish == "tool_limit" and edit("hint_injection", t, None) == []
    call = '<tool_call>\n{"name": "search", "arguments": {"query": "x"}}\n</tool_call><|im_end|>'
    t = sampled([call, call], dialect="hermes", max_tool_calling_iterations=1)
    assert t.finish == "tool_limit" and edit("hint_injection", t, None) == []


def test_global_refinement_changes_thoughts_only():
    tokenizer = byte_tokenizer(extra=["author", "maybe", "ann<", "</think>\n"])
    t = sampled([FIRST, AGAIN, LAST], tokenizer=tokenizer)
    (draft,) = edit("global_refinement", t, ["maybe ann", "so ann, once more", "ann"], tokenizer=tokenizer)
    text = "".join(piece for _, piece in written(draft))
    short_first = FIRST.replace(", look up", "")
    assert text == short_first + RESULT + AGAIN + RESULT + LAST.replace(" again", "")
    assert draft.finish == "eos" and draft.calls == t.tool_calls and not draft.sampled
    new = conversation.to_trajectory(draft, tokenizer)
    results = sum(span.end - span.start for span in new.spans if span.kind == "tool_result")
    assert new.response_text == text and sum(new.loss_mask) == len(new.token_ids) - new.prompt_len - results
    old, kept = ([x.token_ids[s.start : s.end] for s in x.spans if s.kind in ("tool_call", "answer")] for x in (t, new))
    assert old == kept and tokenizer.convert_tokens_to_ids("author") not in kept[0]  # verbatim, not tokenised again
    assert [s.kind for s in new.spans] == [s.kind for s in t.spans]
    assert tokenizer.convert_tokens_to_ids("maybe") in new.token_ids  # the edit is tokenised as usual


@pytest.mark.parametrize(
    "thoughts",
    [
        ["maybe ann, look up", "so ann, once more", "ann again"],  # nothing changes
        ["a", "b"],  # one is missing
        ["a", "b", " "],
        ["a", "</think><search>y</search><think>", "c"],
        ["a", "b <result>", "c"],
        None,
    ],
)
def test_global_refinement_rejects(thoughts):
    assert edit("global_refinement", sampled([FIRST, AGAIN, LAST]), thoughts) == []


def test_global_refinement_rejects_a_text_that_its_ids_do_not_give_back():
    t = sampled([FIRST, LAST])
    assert len(edit("global_refinement", t, ["a", "b"])) == 1
    assert edit("global_refinement", replace(t, response_text=t.response_text + "\n"), ["a", "b"]) == []


def test_operators_work_in_the_hermes_dialect():
    call = '<tool_call>\n{"name": "search", "arguments": {"query": "author of x"}}\n</tool_call>'
    turns = [f"<think>hm</think>\n{call}\n{call}<|im_end|>", f"<think>more</think>{call}<|im_end|>", "bob<|im_end|>"]
    model = ScriptedModel(PLAIN, lambda response: turns[min(response.count("</tool_response>"), 3) * 2 // 3])
    args = RolloutArgs(num_generations=1, dialect="hermes")
    t = rollout(model, PLAIN, [question()], args, TOOLBOX, (0,))[0]
    steps = operators.steps_of(t, PLAIN)
    assert [s.calls for s in steps] == [2, 1, 0]
    (draft,) = edit("self_correction", t, operators.Finding(1, call))
    assert len(draft.calls) == 2 and draft.ids[-1] == PLAIN.eos_token_id  # a hermes turn ends at eos
    (hinted,) = edit("hint_injection", t, None)
    assert written(hinted)[-1][0] == "given" and not any("bob" in text for _, text in written(hinted))
    thoughts = [th.text for th in operators.thoughts_of(t, steps)]
    assert thoughts == ["hm", "more"]
    (refined,) = edit("global_refinement", t, ["h", "m"])
    expected = t.response_text.replace("hm", "h").replace("more", "m")
    assert conversation.to_trajectory(refined, PLAIN).response_text == expected


def test_a_character_of_several_tokens_is_not_split():
    starts = [0, 1, 1, 2, 2, 2, 3, 4]  # of "aé€b" byte by byte, and its length
    assert [operators._floor(starts, at) for at in range(5)] == [0, 1, 3, 6, 7]
    assert operators._floor([0, 3, 5], 4) == 1  # inside the second token
    assert operators._floor([0, 0, 5], 3) == 0  # whose first character two tokens share


def test_thoughts_with_wide_characters_are_spliced_at_token_ends():
    t = sampled(["<think>né</think>é<answer>ann</answer>"])
    (draft,) = edit("global_refinement", t, ["€"])
    assert "".join(text for _, text in written(draft)) == "<think>€</think>é<answer>ann</answer>"


def test_every_operator_asks_what_critics_answer():
    assert {o.ask for o in operators.OPERATORS.values()} == set(critics.Critic._fields)


# ---------------------------------------------------------------------------------------------------- critics


def rule(ask, t, tokenizer=PLAIN):
    return getattr(critics.rule_critic(None, tokenizer, None), ask)([t])[0]


def test_rule_critic_names_the_first_call_beyond_the_need_or_repeated():
    t = sampled([FIRST, AGAIN, LAST])
    assert rule("redundant_step", t) == operators.Finding(0, "<think>so ann, once more</think>\n")  # ann was known
    repeat = operators.Finding(1, "<think>ann again</think>\n")
    assert rule("redundant_step", replace(t, meta={"min_tool_calls": 1})) == repeat
    assert rule("redundant_step", replace(t, meta={"min_tool_calls": 2})) == repeat
    assert rule("redundant_step", replace(t, meta={"min_tool_calls": 0})).step == 0
    guess = FIRST.replace("maybe ann, ", "")
    other = AGAIN.replace("author", "writer")
    assert rule("redundant_step", sampled([guess, LAST])) == "none"
    assert rule("redundant_step", sampled([guess, other, LAST])) == repeat  # unused
    assert rule("redundant_step", sampled([guess, other, LAST], question(min_tool_calls=1))).step == 1
    assert rule("redundant_step", sampled([guess, other, LAST], question(min_tool_calls=2))) == "none"
    failed = sampled(["<search></search>", guess, LAST], question(min_tool_calls=1))
    assert rule("redundant_step", failed) == "none"  # only executed calls count


def test_rule_critic_knows_a_rewording_that_the_noisy_index_made_necessary():
    passages = {"author of x": "writer of y is bob", "x author": "author of x is ann"}
    passages["x of author"] = passages["x author"]
    toolbox = {"search": lambda query: ToolResult(passages[query], True, None, 0.0)}
    turns = [f"<search>{query}</search>" for query in passages]
    needed = sampled([*turns[:2], LAST], question(min_tool_calls=1), toolbox=toolbox)
    assert rule("redundant_step", needed) == "none"
    assert rule("redundant_step", sampled([*turns, LAST], question(min_tool_calls=1), toolbox=toolbox)).step == 2


def test_rule_critic_leaks_nothing_of_a_removed_result():
    """The world says one call was too many, but what followed used its result: the step is sampled anew."""
    toolbox = {"search": lambda query: ToolResult("nobody" if "author" in query else "bob", True, None, 0.0)}
    turns = ["<search>author of x</search>", "<search>writer of x</search>", LAST.replace("ann", "bob")]
    t = sampled(turns, question(min_tool_calls=1), toolbox=toolbox)
    assert rule("redundant_step", t) == operators.Finding(1, "")


def test_rule_critic_finds_the_failed_call_then_the_repeat_then_the_answer():
    assert rule("flawed_step", sampled(["<search></search>", AGAIN, LAST])) == operators.Finding(0, "")
    assert rule("flawed_step", sampled([FIRST, AGAIN, LAST])) == operators.Finding(1, "")
    assert rule("flawed_step", sampled([FIRST, LAST])) == operators.Finding(1, "")


def test_rule_critic_drops_the_filler_of_the_world():
    filled = "<think>right, let me see, it is ann</think>\n<search>x</search>"
    t = sampled([filled, "<think>hmm, well,</think><answer>ann</answer>"])
    assert rule("rewrite_thoughts", t) == ["it is ann", "hmm, well,"]  # a thought is not emptied


def test_rule_critic_drops_repeated_sentences():
    first = "<think>It is ann. I check. It is ann.</think>\n<search>x</search>"
    t = sampled([first, "<think>It is ann. Done.</think><answer>ann</answer>"])
    assert rule("rewrite_thoughts", t) == ["It is ann. I check.", "Done."]
    again = sampled([first, "<think>I check.</think><answer>ann</answer>"])
    assert rule("rewrite_thoughts", again)[1] == "I check."  # said before, but a thought is not emptied
    assert rule("rewrite_thoughts", sampled([LAST])) == "none"


def test_entropy_critic_reads_the_reasoning_before_each_call(tmp_path):
    t = sampled([FIRST, AGAIN, LAST])
    steps = operators.steps_of(t, PLAIN)

    def with_levels(levels):
        entropy = [0.0] * len(t.token_ids)
        for step, level in zip(steps, levels):
            for i in range(step.start, step.end):
                entropy[i] = level
        for span in t.spans:
            if span.kind == "tool_call":  # a call's own tokens belong to no segment
                entropy[span.start : span.end] = [9.0] * (span.end - span.start)
        return replace(t, entropy=entropy)

    assert critics.segment_entropies(with_levels([3, 2, 1])) == pytest.approx([3, 2, 1])
    critic = critics.entropy_critic(ScriptedModel(PLAIN, policy_and_critic), PLAIN, arguments(tmp_path))
    falling, rising, flat = with_levels([3, 2, 1]), with_levels([1, 2, 3]), with_levels([3, 1, 1])
    found = critic.redundant_step([falling, rising, flat])
    assert found[0] == "none" and found[1].step == 0 and found[2] == operators.Finding(1, "<think>ann again</think>\n")
    assert [f.step for f in critic.flawed_step([falling, rising])] == [0, 2]
    empty = sampled(["<search>author of x</search>", LAST])
    H = critics.segment_entropies(empty, entropy=[1.0] * len(empty.token_ids))
    assert math.isnan(H[0]) and H[1] == 1.0
    stored = replace(empty, entropy=[float(m) for m in empty.loss_mask])
    assert critic.redundant_step([stored]) == ["none"] and critic.flawed_step([stored]) == [operators.Finding(1, "")]


SHORT = "<think>so ann</think>"
BOTH = SHORT + "<search>x</search>"


@pytest.mark.parametrize(
    "answer, expected",
    [
        (f"<step>2</step>\n<rewrite>{SHORT}</rewrite>", operators.Finding(1, SHORT)),
        (f"<step> 1 </step><rewrite>\n{SHORT}\n</rewrite>", operators.Finding(0, SHORT)),
        ("<step>1</step><rewrite><search>x</search></rewrite>", operators.Finding(0, "<search>x</search>")),
        (f"<step>1</step><rewrite>{BOTH}</rewrite>", operators.Finding(0, BOTH)),
        ("<step>none</step>", "none"),
        (f"<step>none</step><rewrite>{SHORT}</rewrite>", "malformed"),
        (f"I think <step>2</step><rewrite>{SHORT}</rewrite>", "malformed"),
        ("<step>2</step>", "malformed"),
        (f"<step>0</step><rewrite>{SHORT}</rewrite>", "malformed"),
        (f"<step>4</step><rewrite>{SHORT}</rewrite>", "malformed"),
        (f"<step>two</step><rewrite>{SHORT}</rewrite>", "malformed"),
        ("<step>2</step><rewrite></rewrite>", "malformed"),
        ("<step>2</step><rewrite>so ann</rewrite>", "malformed"),
        ("<step>2</step><rewrite><think>so ann</rewrite>", "malformed"),
        ("<step>2</step><rewrite><search>x</rewrite>", "malformed"),
        ("<step>2</step><rewrite><search></search></rewrite>", "malformed"),
        ("<step>2</step><rewrite><search>x</search><search>y</search></rewrite>", "malformed"),
        (f"<step>2</step><rewrite>{SHORT}<answer>ann</answer></rewrite>", "malformed"),
        (f"<step>2</step><rewrite>{SHORT}{RESULT}</rewrite>", "malformed"),
        ("", "malformed"),
    ],
)
def test_answers_of_the_model_critic_are_read_strictly(answer, expected):
    t = sampled([FIRST, AGAIN, LAST])
    assert critics.parse_finding(answer, t, operators.steps_of(t, PLAIN), redundant=True) == expected


def test_a_redundant_step_gets_shorter_and_a_flawed_one_an_analysis():
    t = sampled([FIRST, AGAIN, LAST])
    steps = operators.steps_of(t, PLAIN)
    answer = f"<step>2</step><rewrite>{AGAIN}</rewrite>"
    assert critics.parse_finding(answer, t, steps, redundant=True) == "malformed"
    assert critics.parse_finding(answer, t, steps, redundant=False) == "malformed"
    analysed = "<analysis>it repeats</analysis>\n" + answer
    assert critics.parse_finding(analysed, t, steps, redundant=False) == operators.Finding(1, AGAIN)
    assert critics.parse_finding(analysed.replace(AGAIN, SHORT), t, steps, redundant=True) == "malformed"
    assert critics.parse_finding("<analysis>fine</analysis><step>none</step>", t, steps, redundant=False) == "none"


def test_thoughts_of_the_model_critic_are_counted():
    assert critics.parse_thoughts("<thought>a</thought>\n<thought> b </thought>", 2) == ["a", "b"]
    one = "<thought>a</thought>"
    for bad in (one, one + "<thought></thought>", "x" + one + one, one * 3, ""):
        assert critics.parse_thoughts(bad, 2) == "malformed"


# ---------------------------------------------------------------------------------------------------- rounds


def policy_and_critic(response, prompt):
    """One script for both roles: question "good" is answered right after a needless call, "bad" wrong without one."""
    if "Find the first redundant step" in prompt:
        redundant = "<step>2</step>\n<rewrite><think>so ann</think></rewrite><|im_end|>"
        return redundant if "once more" in prompt else "<step>none</step><|im_end|>"
    if "Find the first flawed step" in prompt:
        if "guess" not in prompt:
            return "hm, I do not know<|im_end|>"
        return f"<analysis>no call</analysis>\n<step>1</step>\n<rewrite>{FIRST}</rewrite><|im_end|>"
    if "new thoughts" in prompt:
        n = int(prompt.split("Write its ")[1].split()[0])
        return "".join(f"<thought>t{k}</thought>\n" for k in range(n)) + "<|im_end|>"
    if "good" in prompt:
        if response.endswith("so ann</think>\n"):
            return "<answer>ann</answer>"
        return [FIRST, AGAIN, LAST][response.count("</result>")]
    if any(response.endswith(hint) for hint in operators.HINTS["qa"]):
        return "</think>\n<search>author of x</search>"
    return LAST if "</result>" in response else "<think>a guess</think>\n<answer>bob</answer>"


QUESTIONS = [Question(f"{kind}{i}", f"{kind} question {i}", "ann", "qa") for i in range(3) for kind in ("good", "bad")]


def arguments(tmp_path, **flags):
    flags = {"rollout_batch_size": 6, "critic_max_tokens": 200, "max_completion_length": 500} | flags
    return flywheel.Args(model_name_or_path="m", data="d", output_dir=str(tmp_path), **flags)


def run(folder, script=policy_and_critic, questions=QUESTIONS, **flags):
    folder.mkdir(exist_ok=True)
    args = arguments(folder, **flags)
    log = flywheel.evolve(folder, questions, ScriptedModel(PLAIN, script), PLAIN, args, TOOLBOX)
    return log, load_trajectories(folder / "pool.jsonl")


def test_the_model_critic_drives_all_four_operators(tmp_path):
    log, pool = run(tmp_path)
    counts = flywheel.totals(log)["operators"]
    assert all(counts[name]["correct"] > 0 for name in operators.OPERATORS), counts
    assert counts["redundant_modification"]["none"] > 0
    made = {t.meta["operator"]: t for t in pool if t.meta["round"] == 1}
    assert made["redundant_modification"].response_text == FIRST + RESULT + SHORT + "\n<answer>ann</answer>"
    assert made["self_correction"].response_text == FIRST + RESULT + LAST  # the call of the edit was run
    assert made["global_refinement"].response_text.startswith("<think>t0</think>\n<search>author of x</search>")
    hinted = made["hint_injection"]
    assert hinted.n_calls == 1 and well_formed(hinted.response_text, "tags", "qa") and hinted.rewards["correct"] == 1
    zeros = "".join(PLAIN.decode([i]) for i, m in zip(hinted.token_ids, hinted.loss_mask) if not m)
    assert any(hint in zeros for hint in operators.HINTS["qa"])
    assert not any(t.sampled for name, t in made.items() if name != "fresh")
    first = [t for t in pool if t.meta["operator"] == "sample"]
    assert all(t.sampled for t in first) and [t.question_id for t in first[:2]] == ["good0", "bad0"]
    assert all(made[name].meta["parent"] == 0 for name in operators.OPERATORS)


def test_the_pool_has_no_duplicates_and_is_bounded(tmp_path):
    _, pool = run(tmp_path, rounds=3)
    assert len({(t.question_id, tuple(t.token_ids)) for t in pool}) == len(pool)
    for q in QUESTIONS:
        mine = [t for t in pool if t.question_id == q.id]
        assert [t.sample_idx for t in mine] == list(range(len(mine))) and len(mine) <= 1 + 3 * 3
        assert {t.meta["round"] for t in mine} <= {0, 1, 2, 3}


def test_malformed_critic_answers_are_counted_and_change_nothing(tmp_path):
    def broken(response, prompt):
        return "no idea<|im_end|>" if "Reply with nothing but" in prompt else policy_and_critic(response, prompt)

    log, pool = run(tmp_path, broken, rounds=1)
    counts = flywheel.totals(log)["operators"]
    for name in operators.OPERATORS:
        assert counts[name]["malformed"] == counts[name]["asked"] == 3
        assert name == "hint_injection" or counts[name]["added"] == 0
    assert counts["fresh"]["duplicate"] == 3 and len(pool) == 6 + counts["hint_injection"]["added"]


def test_a_round_that_yields_nothing_ends_the_question(tmp_path):
    wrong = LAST.replace("ann", "bob")
    log, pool = run(tmp_path, lambda response: wrong, critic="rule", operators=["self_correction"])
    assert len(pool) == len(QUESTIONS) and max(record["round"] for record in log) == 1


def test_operators_can_be_selected_and_all_edits_the_whole_pool(tmp_path):
    _, best = run(tmp_path / "a", rounds=2, operators=["hint_injection"])
    assert {t.meta["operator"] for t in best} <= {"sample", "fresh", "hint_injection"}
    log, pool = run(tmp_path / "b", rounds=2, per_round="all")
    assert len(pool) > len(best) and "fresh" not in flywheel.totals(log)["operators"]
    second = [record for record in log if record["round"] == 2]
    for q in QUESTIONS:
        size = sum(t.question_id == q.id and t.meta["round"] < 2 for t in pool)
        assert [len(r["picked"][q.id]) for r in second if q.id in r["picked"]] == [size]
    _, capped = run(tmp_path / "c", rounds=2, per_round="all", max_per_question=3)
    assert max(t.sample_idx for t in capped) == 2


def test_the_best_trajectory_is_edited_once():
    def t(i, s, calls):
        base = sampled([FIRST, LAST]) if calls else sampled([LAST])
        return replace(base, sample_idx=i, rewards={"correct": s, "format": 0.0})

    group = [t(0, 0.0, 1), t(1, 0.9, 1), t(2, 1.0, 1), t(3, 1.0, 0)]
    order, before = [], set()
    while picked := flywheel.pick(group, before):
        order.append(picked[0].sample_idx)
        before.add(order[-1])
    assert order == [0, 3, 2, 1]


def test_rounds_may_call_more_often_than_the_first_samples(tmp_path):
    flags = {"rounds": 1, "operators": ["hint_injection"], "max_tool_calling_iterations": 0}
    for extra, finish in ((1, "eos"), (0, "tool_limit")):
        _, pool = run(tmp_path / str(extra), questions=QUESTIONS[1:2], extra_calls=extra, **flags)
        assert {t.finish for t in pool if t.meta["round"]} == {finish}


def test_an_edit_without_room_is_rejected(tmp_path):
    room = len(FIRST + RESULT + AGAIN + RESULT + LAST)
    long = policy_and_critic("", "Find the first flawed step guess").replace("maybe", "maybe" * 100)

    def script(response, prompt):
        return long if "flawed step" in prompt else policy_and_critic(response, prompt)

    log, pool = run(tmp_path, script, rounds=1, max_completion_length=room, critic_max_tokens=900)
    assert flywheel.totals(log)["operators"]["self_correction"]["rejected"] == 3
    assert max(len(t.token_ids) - t.prompt_len for t in pool) == room


def test_rft_takes_correct_clean_trajectories_all_or_those_that_call_least(tmp_path):
    short, long_, failed = sampled([LAST]), sampled([FIRST, LAST]), sampled(["<search></search>", LAST])
    good = {"correct": 1.0, "format": 0.0}
    group = [
        replace(long_, sample_idx=0, rewards=good),
        replace(failed, sample_idx=1, rewards=good),
        replace(short, sample_idx=2, rewards={"correct": 0.8, "format": 0.0}),
        replace(short, sample_idx=3, rewards={"correct": 1.0, "format": -1.0}),
        replace(short, sample_idx=4, rewards=good),
    ]
    group += [replace(long_, sample_idx=i, rewards=good) for i in range(5, 10)]
    assert [t.sample_idx for t in flywheel.rft_set(group)] == [0, 4, 5, 6, 7, 8, 9]
    assert [t.sample_idx for t in flywheel.rft_set(group, "all", 1)] == [0]
    assert [t.sample_idx for t in flywheel.rft_set(group, "fewest_calls", 3)] == [4, 0, 5]
    assert arguments(tmp_path).rft_select == "all" and arguments(tmp_path).rft_per_question == 0


# ---------------------------------------------------------------------------------------------------- kills


def _child(folder, where, n):
    """A run that kills itself at its n-th call of the model, or at its n-th write: trajectories out, record not yet."""
    tqdm.set_lock(threading.RLock())  # the usual one is shared between processes, and a killed one would keep it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    ticks, fsync = itertools.count(1), os.fsync

    def tick():
        if next(ticks) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def script(response, prompt):
        if where == "model":
            tick()
        return policy_and_critic(response, prompt)

    def write(descriptor):
        fsync(descriptor)
        if where == "write":
            tick()

    os.fsync = write
    run(folder, script)


def test_killed_ten_times_it_ends_with_the_same_pool(tmp_path):
    calls = []
    run(tmp_path / "whole", lambda response, prompt: calls.append(0) or policy_and_critic(response, prompt))
    folder, rng = tmp_path / "killed", random.Random(0)
    for where in 5 * ["model", "write"]:
        n = rng.randint(1, len(calls) // 10 if where == "model" else 2)
        child = multiprocessing.get_context("fork").Process(target=_child, args=(folder, where, n))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        if rng.random() < 0.5:  # what a kill inside a write leaves behind
            with open(folder / "pool.jsonl", "a") as out:
                out.write('{"question_id": "goo')
            if rng.random() < 0.5:
                with open(folder / "rounds.jsonl", "a") as out:
                    out.write('{"chunk": 0, "rou')
    run(folder)
    for name in ("pool.jsonl", "rounds.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_pool_shorter_than_recorded_is_refused(tmp_path):
    run(tmp_path, rounds=1)
    os.truncate(tmp_path / "pool.jsonl", 100)
    with pytest.raises(DataError, match="pool.jsonl is shorter than"):
        run(tmp_path, rounds=1)


# ---------------------------------------------------------------------------------------------------- endpoint


class Endpoint(BaseHTTPRequestHandler):
    """An OpenAI-compatible chat endpoint that answers with the script above."""

    requests = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Endpoint.requests.append((self.path, self.headers["Authorization"], body))
        text = policy_and_critic("", body["messages"][-1]["content"]).removesuffix("<|im_end|>")
        message = {"role": "assistant", "content": "<think>hm</think>" + text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "critic", "choices": [choice]}
        reply["usage"] = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_the_critic_can_be_an_endpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_private")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        flags = {"rounds": 2, "critic_base_url": f"http://127.0.0.1:{server.server_port}/v1", "critic_model": "critic"}
        _, remote = run(tmp_path / "remote", questions=QUESTIONS[:2], **flags)
    finally:
        server.shutdown()
        server.server_close()
    _, local = run(tmp_path / "local", questions=QUESTIONS[:2], rounds=2)
    assert [t.token_ids for t in remote] == [t.token_ids for t in local]
    path, key, body = Endpoint.requests[0]
    assert path == "/v1/chat/completions" and key == "Bearer none" and body["model"] == "critic"
    with pytest.raises(DataError, match="--critic_base_url"):
        run(tmp_path / "gone", questions=QUESTIONS[:2], **flags)


# ---------------------------------------------------------------------------------------------------- command line


def real_questions(tmp_path, *names):
    folder = os.environ.get("TARE_DATA")
    if not folder:
        pytest.skip("TARE_DATA is not set")
    rows = []
    for name, key in names:
        lines = (Path(folder) / name).read_text().splitlines()[:2]
        rows += [{**json.loads(line), "id": f"{key}-{i}"} for i, line in enumerate(lines)]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("critic", ["rule", "entropy"])
def test_real_questions_go_through_and_load_for_sft(tmp_path, tiny_model, critic, monkeypatch):
    data = real_questions(tmp_path, ("math/gsm8k_test.jsonl", "gsm"), ("qa/musique.jsonl", "hop"))
    flags = dict(model_name_or_path=str(tiny_model), data=str(data), output_dir=str(tmp_path / "out"), critic=critic)
    args = flywheel.Args(**flags, rounds=1, max_completion_length=64, threads=1)
    monkeypatch.setattr(flywheel, "open_tools", lambda a: open_none())
    result = flywheel.main(args)
    assert result["pool"] >= 8 and set(result["operators"]) == {"sample", "self_correction", "hint_injection"}
    assert flywheel.main(args) == result
    sft = train_sft.Args(model_name_or_path=str(tiny_model), data="x", output_dir="x")
    rows = len(PLAIN) + 5  # of the model's embedding; the random model also samples the five that no token has
    examples = train_sft.load_examples(str(tmp_path / "out" / "pool.jsonl"), load_tokenizer(str(tiny_model)), sft, rows)
    assert len(examples) == result["pool"] and (tmp_path / "out" / "rft.jsonl").exists()
    with pytest.raises(DataError, match="--rounds"):
        flywheel.main(replace(args, rounds=2))


def test_the_rft_set_of_real_questions_loads_for_sft(tmp_path, tiny_model, monkeypatch):
    """A random model is never right: here every other sample counts as correct, so that an RFT set comes out."""
    data = real_questions(tmp_path, ("math/gsm8k_test.jsonl", "gsm"), ("qa/hotpotqa.jsonl", "hop"))
    flags = dict(model_name_or_path=str(tiny_model), data=str(data), output_dir=str(tmp_path / "out"), critic="entropy")
    args = flywheel.Args(**flags, num_generations=3, rounds=1, max_completion_length=32, threads=1)
    monkeypatch.setattr(flywheel, "open_tools", lambda a: open_none())
    monkeypatch.setattr(flywheel, "grade", lambda t, *_: (float(sum(t.token_ids) % 2), True))
    result = flywheel.main(args)
    sft = train_sft.Args(model_name_or_path=str(tiny_model), data="x", output_dir="x")
    rows = len(PLAIN) + 5  # of the model's embedding; the random model also samples the five that no token has
    examples = train_sft.load_examples(str(tmp_path / "out" / "rft.jsonl"), load_tokenizer(str(tiny_model)), sft, rows)
    assert len(examples) == result["rft"] > 0 and all(any(e.loss_mask) for e in examples)


class open_none:
    """A tool box without tools; the sandbox has its own tests."""

    def __enter__(self):
        return {}

    def __exit__(self, *_):
        pass


def test_bad_flags_are_named(tmp_path):
    for flags, message in [
        ({"operators": ["magic"]}, "--operators 'magic'"),
        ({"mode": "think"}, "--mode think"),
        ({"branching": "arpo"}, "--branching arpo"),
        ({"critic": "rule", "critic_base_url": "http://x"}, "--critic_base_url"),
        ({"rounds": -1}, "--rounds must be a number from 0 on, not -1"),
        ({"rft_per_question": -1}, "--rft_per_question"),
        ({"rft_select": "fewest_calls"}, "--rft_select fewest_calls needs an --rft_per_question above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **flags)


# ---------------------------------------------------------------------------------------------------- selection


def pareto_by_definition(points, n):
    """Fronts by peeling and crowding distances, written down from the definitions."""

    def dominates(p, q):
        return p[0] >= q[0] and p[1] >= q[1] and p != q

    left, chosen = [i for i, p in enumerate(points) if p[0] != 0], []
    while left and len(chosen) < n:
        front = [i for i in left if not any(dominates(points[j], points[i]) for j in left)]
        left = [i for i in left if i not in front]
        if len(chosen) + len(front) > n:
            distance = dict.fromkeys(front, 0.0)
            for axis in (0, 1):
                order = sorted(front, key=lambda i: points[i][axis])
                low, high = points[order[0]][axis], points[order[-1]][axis]
                if low == high:
                    continue
                for before, i, after in zip(order, order[1:], order[2:]):
                    distance[i] += (points[after][axis] - points[before][axis]) / (high - low)
                distance[order[0]] = distance[order[-1]] = math.inf
            front = sorted(front, key=lambda i: (-distance[i], i))[: n - len(chosen)]
        chosen += front
    return sorted(chosen)


def test_pareto_by_hand():
    points = [(0.5, 0.0), (0.4, 1.0), (0.0, 9.0), (0.3, 2.0), (0.2, 1.5), (0.5, 0.0)]
    assert selection.pareto_select(points, 4) == [0, 1, 3, 5]  # first front; (0, 9) has no signal
    assert selection.pareto_select(points, 5) == [0, 1, 3, 4, 5]
    # front 0, 1, 3, 5: ends infinite on either axis are 3 (lowest S_corr, highest S_tool), 5 (last of the highest
    # S_corr) and 0 (first of the lowest S_tool); 1 is inside
    assert selection.pareto_select(points, 3) == [0, 3, 5]
    assert selection.pareto_select(points, 99) == [0, 1, 3, 4, 5] and selection.pareto_select(points, 0) == []
    assert selection.pareto_select([], 3) == [] and selection.pareto_select([(0.0, 1.0)], 3) == []
    for bad in ((points, -1), ([(math.nan, 1.0)], 1), ([(1.0, math.inf)], 1)):
        with pytest.raises(ValueError):
            selection.pareto_select(*bad)


values = st.one_of(st.sampled_from([0.0, 0.25, 0.5]), st.floats(0, 4, allow_subnormal=False))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(values, values), max_size=24), st.integers(0, 26))
def test_pareto_equals_the_definition(points, n):
    assert selection.pareto_select(points, n) == pareto_by_definition(points, n)


def test_pareto_equals_the_definition_on_ties_and_degenerate_axes():
    rng = random.Random(1)
    for _ in range(60):
        n = rng.randint(1, 40)
        kind = rng.choice(["grid", "line", "x", "y", "one"])
        make = {
            "grid": lambda: (rng.randrange(4) / 3, rng.randrange(4) / 3),
            "line": lambda: (0.1 + 0.9 * (v := rng.random()), 1 - v),
            "x": lambda: (0.5, rng.randrange(5)),
            "y": lambda: (rng.randrange(5), 2.0),
            "one": lambda: (0.5, 0.5),
        }[kind]
        points = [make() for _ in range(n)]
        for k in (1, n // 2, n):
            assert selection.pareto_select(points, k) == pareto_by_definition(points, k), (points, k)


def test_pareto_takes_50k_questions_in_seconds():
    rng = random.Random(0)
    for points in (
        [(rng.random(), rng.random()) for _ in range(50_000)],
        [(i / 50_000 + 0.1, i / 50_000) for i in range(50_000)],  # as many fronts as points
    ):
        started = time.perf_counter()
        assert len(selection.pareto_select(points, 5_000)) == 5_000
        assert time.perf_counter() - started < 5


def group(i, scores, calls, task="qa"):
    return selection.Group(str(i), task, scores, calls)


def test_selectors_choose_from_questions_with_signal():
    groups = [
        group(0, [1.0, 1.0], [0, 5]),  # all right
        group(1, [1.0, 0.0], [1, 1]),
        group(2, [0.7, 0.2], [0, 4]),  # no F1 of 0.75
        group(3, [0.9, 0.5], [0, 3]),
        group(4, [0.8, 0.8], [0, 3]),  # no F1 below 0.75
        group(5, [1.0, 0.0], [0, 2], "math"),
        group(6, [0.0, 0.0], [0, 9], "math"),
    ]
    assert groups[3].point == (pstdev([0.9, 0.5]), 1.5)
    assert selection.select(groups, "all", 0, 0) == list(range(7))
    for name in ("random", "pareto", "s_corr_only", "s_tool_only"):
        assert selection.select(groups, name, 99, 0) == [1, 3, 5]
        assert len(selection.select(groups, name, 2, 0)) == 2
    assert selection.select(groups, "s_tool_only", 1, 0) == [3]
    assert selection.select(groups, "s_corr_only", 2, 0) == [1, 5]
    assert selection.select(groups, "pareto", 2, 0) == [3, 5]  # (.5, 1) and (.2, 1.5) dominate or flank (.5, 0)
    assert {tuple(selection.select(groups, "random", 1, seed)) for seed in range(20)} == {(1,), (3,), (5,)}
    ties = [group(i, [1.0, 0.0], [0, 1]) for i in range(50)]
    assert selection.select(ties, "pareto", 5, 0) == selection.select(ties, "pareto", 5, 0)
    assert selection.select(ties, "pareto", 5, 0) != selection.select(ties, "pareto", 5, 1)


def test_the_command_selects_rows(tmp_path):
    rows = [{"id": f"q{i}", "question": "who wrote x?", "answer": ["ann", "a"], "min_tool_calls": i} for i in range(4)]
    data, sampled_file, out = tmp_path / "q.jsonl", tmp_path / "t.jsonl", tmp_path / "s.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong = LAST.replace("ann", "bob")
    lines = []
    for row, turns in zip(rows, [([LAST], [LAST]), ([LAST], [wrong]), ([FIRST, LAST], [wrong]), ([wrong], [wrong])]):
        for i, turn in enumerate(turns):
            t = sampled(turn, question_of(row, "row"))
            lines.append(replace(t, sample_idx=i).to_json() + "\n")
    sampled_file.write_text("".join(lines))
    flags = dict(trajectories=str(sampled_file), data=str(data), output=str(out), num_questions=1)
    selection.main(selection.Args(**flags))
    assert [q.id for q in load_questions(str(out))] == ["q2"]
    assert load_questions(str(out)) == load_questions(str(data))[2:3]
    with pytest.raises(DataError, match="exists"):
        selection.main(selection.Args(**flags))
    with pytest.raises(ValueError, match="--num_questions 1 does not go with --selector all"):
        selection.Args(**flags, selector="all")
    sampled_file.write_text(lines[0].replace('"q0"', '"q9"'))
    with pytest.raises(DataError, match=r"t.jsonl:1: question_id 'q9' is not in --data"):
        selection.main(selection.Args(**flags, overwrite=True))


def test_rows_of_questions_come_back_as_they_were():
    for q in (
        Question("a", "x?", ["y", "z"], "qa", meta={"family": "lookup", "known": True}),
        Question("b", "x?", "2", "math", system="be brief"),
        Question("c", "f?", [{"f": {"x": [1]}}], "function", tools=[{"name": "f"}]),
    ):
        assert question_of(json.loads(json.dumps(selection.row_of(q))), "row") == q
