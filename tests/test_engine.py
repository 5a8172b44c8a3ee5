"""Fast engine against the reference on a random model: equal trajectories, bits that no batch changes, shared cache.

    python -m pytest tests/test_engine.py
"""

import json
import math
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny_models import save_with_byte_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

import rollout as r
import train_rl
from bench.rollout import scripted_noise
from core import conversation as c
from core.model import ModelArgs, load_policy
from core.run import seed_of
from core.trajectory import DataError, Question
from data.questions import load_questions
from engines import branching, hf, slot_cache
from engines import fast as e
from engines.toolbox import open_tools
from engines.turns import gumbel_noise, start_draft
from rollout import RolloutArgs
from tools.sandbox import ToolResult

ROOT = Path(__file__).parent.parent
CALL = "<think>so</think>\n<python>print(2)</python>"
LONG = "<think>so</think>\n<python>print(99)</python>"  # its result is prefilled, not fed in step
ANSWER = "\n<think>fine</think>\n<answer>\\boxed{2}</answer>"
TURNS = [  # one trajectory each
    [CALL, LONG, CALL, ANSWER],
    [CALL, ANSWER],
    [ANSWER],
    ["<think>" + "x" * 400],  # spends its budget
    [CALL] * 9,  # spends its calls
    [LONG] * 9,  # a result no longer fits
    ["<python></python>", ANSWER],  # malformed: answered with an error, after which the script is off by some tokens
    ["<python>print(2)<|im_end|>"],  # never closed
    ["stray </python>" + ANSWER],  # a turn that asks for nothing
    ["<search>x</search>", ANSWER],  # no such tool
]


@pytest.fixture(scope="module")
def real(tiny_model):
    return load_policy(ModelArgs(model_name_or_path=str(tiny_model)), trainable=False)


def question(i, repeats=1):
    return Question(str(i), "1+1?" * repeats, "2", "math")


def drafts_of(questions, tokenizer, args):
    return [start_draft(q, i, tokenizer, args, (0,)) for q in questions for i in range(args.num_generations)]


def echo(code):
    return ToolResult("passage " * 8 if "99" in code else "2", True, None, 0.5)


def script_of(turns, tokenizer):
    """Response ids of a draft that writes these turns, with the tool's results between."""
    ids = []
    for turn in turns:
        ids += c.encode(tokenizer, turn)
        if code := re.search("<python>(.+)</python>", turn):
            ids += c.encode(tokenizer, c.result_text([echo(code[1]).text], tokenizer, "tags"))
    return ids


def scripted(monkeypatch, drafts, scripts):
    """Put noise in place that leaves the real model no choice but the scripts."""
    noise = scripted_noise({d.seed: ids for d, ids in zip(drafts, scripts)})
    monkeypatch.setattr(hf, "gumbel_noise", noise)
    monkeypatch.setattr(e, "gumbel_noise", noise)


def finished(complete, real, drafts, args, toolbox):
    complete(*real, drafts, args, toolbox)
    return [c.to_trajectory(d, real[1]).to_json() for d in drafts]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_ids_equal_those_of_generate(real, temperature):
    model, tokenizer = real
    questions = [question(i, 1 + 60 * (i % 3)) for i in range(4)]  # one to four prefill pieces
    flags = dict(num_generations=2, max_completion_length=24, temperature=temperature)
    slow = r.rollout(model, tokenizer, questions, RolloutArgs(**flags), {}, (3,))
    fast = r.rollout(model, tokenizer, questions, RolloutArgs(**flags, engine="fast"), {}, (3,))
    assert [t.to_json() for t in slow] == [t.to_json() for t in fast]
    assert len({tuple(t.token_ids) for t in fast}) == (8 if temperature else 3)
    assert model.config._attn_implementation == "sdpa"


def test_an_adapter_in_training_samples_as_under_generate(tiny_model):
    model, tokenizer = load_policy(ModelArgs(model_name_or_path=str(tiny_model)))
    adapter = [p for name, p in model.named_parameters() if "lora_B" in name]
    torch.manual_seed(0)
    for weight in adapter:
        torch.nn.init.normal_(weight, std=0.1)
    model.train()
    flags = dict(num_generations=2, max_completion_length=16)
    slow = r.rollout(model, tokenizer, [question(0)], RolloutArgs(**flags), {}, (0,))
    fast = r.rollout(model, tokenizer, [question(0)], RolloutArgs(**flags, engine="fast"), {}, (0,))
    with model.disable_adapter():
        base = r.rollout(model, tokenizer, [question(0)], RolloutArgs(**flags, engine="fast"), {}, (0,))
    assert [t.token_ids for t in slow] == [t.token_ids for t in fast] != [t.token_ids for t in base]
    assert model.training and all(p.requires_grad for p in adapter)


def test_truncation_is_shared_and_a_repetition_penalty_refused(real):
    model, tokenizer = real
    flags = dict(num_generations=2, max_completion_length=20, top_k=3, top_p=0.8)
    slow = r.rollout(model, tokenizer, [question(0)], RolloutArgs(**flags), {}, (0,))
    fast = r.rollout(model, tokenizer, [question(0)], RolloutArgs(**flags, engine="fast"), {}, (0,))
    assert [t.token_ids for t in slow] == [t.token_ids for t in fast]
    with pytest.raises(ValueError, match="--repetition_penalty 1.1 needs --engine hf"):
        RolloutArgs(engine="fast", repetition_penalty=1.1)


def test_trajectories_with_tools_equal_those_of_generate(real, monkeypatch):
    tokenizer = real[1]
    questions = [question(i, 1 + i % 3) for i in range(len(TURNS))]

    def run(complete, slots):
        flags = dict(max_completion_length=320, max_tool_calling_iterations=3, rollout_batch_size=slots)
        args = RolloutArgs(num_generations=1, **flags)
        drafts = drafts_of(questions, tokenizer, args)
        scripted(monkeypatch, drafts, [script_of(turns, tokenizer) for turns in TURNS])
        return finished(complete, real, drafts, args, {"python": echo})

    slow = run(r.complete, 64)
    assert run(e.complete, 64) == slow
    assert run(e.complete, 3) == slow
    rows = [json.loads(line) for line in slow]
    assert [t["finish"] for t in rows[:6]] == ["eos", "eos", "eos", "length", "tool_limit", "length"]
    assert [len(t["tool_calls"]) for t in rows[:6]] == [3, 1, 0, 0, 4, 3] and rows[0]["response_text"].endswith(ANSWER)


def test_turns_of_limited_length_equal_those_of_generate(real, monkeypatch):
    tokenizer = real[1]
    questions = [question(i, 1 + i % 3) for i in range(len(TURNS))]

    def run(complete, slots):
        args = RolloutArgs(num_generations=1, rollout_batch_size=slots, max_turn_length=len(CALL))
        drafts = drafts_of(questions, tokenizer, args)
        scripted(monkeypatch, drafts, [script_of(turns, tokenizer) for turns in TURNS])
        return finished(complete, real, drafts, args, {"python": echo})

    slow = run(r.complete, 64)
    assert run(e.complete, 3) == slow
    rows = [json.loads(line) for line in slow]
    assert [(t["finish"], sum(t["loss_mask"])) for t in rows[1:4]] == [
        ("length", 2 * len(CALL)),
        ("length", len(CALL)),
        ("length", len(CALL)),
    ]


def test_parallel_calls_of_hermes_equal_those_of_generate(real, monkeypatch):
    tokenizer = real[1]
    call = '<tool_call>\n{"name": "python", "arguments": {"code": "1"}}\n</tool_call>'
    between = c.encode(tokenizer, c.result_text(["2", "2"], tokenizer, "hermes"))
    turns = ["<think>x</think>\n" + call + "\n" + call + "<|im_end|>", "the result is \\boxed{2}<|im_end|>"]
    args = RolloutArgs(num_generations=1, dialect="hermes")
    out = []
    for complete in (r.complete, e.complete):
        drafts = drafts_of([question(0)], tokenizer, args)
        scripted(monkeypatch, drafts, [c.encode(tokenizer, turns[0]) + between + c.encode(tokenizer, turns[1])])
        out += finished(complete, real, drafts, args, {"python": echo})
    assert out[0] == out[1] and out[0].count('"2"') >= 2 and "the result is" in out[0]


@pytest.mark.parametrize("threads, count", [(1, 24), pytest.param(2, 6, marks=pytest.mark.slow)])
def test_logits_do_not_depend_on_the_batch_bit_for_bit(real, monkeypatch, threads, count):
    """At every (draft, position) the same float32 logits alone and among others, in two orders, refilled or not."""
    model, tokenizer = real
    rng = random.Random(0)
    calls = ["<python>2</python>", "<python>99</python>"]
    turns = [["a" * rng.randrange(9) + calls[i % 2], "b" * rng.randrange(9) + "<answer>1</answer>"] for i in range(24)]
    questions = [question(i, 1 + 30 * (i % 3)) for i in range(12)]

    def logits_of(slots, count, order):
        args = RolloutArgs(num_generations=2, max_completion_length=800, rollout_batch_size=slots)
        drafts = drafts_of(questions, tokenizer, args)[:count]
        noise = scripted_noise({d.seed: script_of(t, tokenizer) for d, t in zip(drafts, turns)})
        last, seen = [], {}

        def recording(seeds, positions, vocab):
            seen.update(zip(zip(seeds.tolist(), positions.tolist()), last.pop()))
            return noise(seeds, positions, vocab)

        monkeypatch.setattr(e, "gumbel_noise", recording)
        monkeypatch.setattr(e, "score_processors", lambda args: lambda ids, logits: last.append(logits) or logits)
        e.complete(model, tokenizer, drafts[::order], args, {"python": echo})
        return seen

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = logits_of(64, count, 1)
        for slots, few, order in ((17, count, -1), (1, 2, 1)):
            other = logits_of(slots, few, order)
            assert len(other) > 35 * few and other.keys() <= together.keys()
            assert all(torch.equal(logits, together[at]) for at, logits in other.items()), (slots, order)
    finally:
        torch.set_num_threads(before)


def test_a_prompt_is_prefilled_once_and_a_context_never_again(real, monkeypatch):
    tokenizer = real[1]
    args = RolloutArgs(num_generations=4, max_completion_length=900, rollout_batch_size=3)
    drafts = drafts_of([question(0), question(1, 30)], tokenizer, args)
    scripted(monkeypatch, drafts, [script_of([LONG, CALL, ANSWER], tokenizer)] * 8)
    counts = e.complete(*real, drafts, args, {"python": echo})
    prompts = [d.prompt_len - 1 for d in drafts[::4]]
    short, long = (len(c.encode(tokenizer, c.result_text([echo(k).text], tokenizer, "tags"))) for k in ("2", "99"))
    assert short <= e.IN_STEP < long
    assert counts["copied"] == 3 * sum(prompts)
    assert counts["prefilled"] == sum(prompts) + 8 * long
    assert counts["fed"] == 8 * short and counts["sampled"] == sum(sum(d.mask) for d in drafts)


def test_at_most_the_batch_size_is_decoded_at_once_and_the_tail_is_narrow(real, monkeypatch):
    args = RolloutArgs(num_generations=1, max_completion_length=200, rollout_batch_size=33)
    drafts = drafts_of([question(i) for i in range(40)], real[1], args)
    scripted(monkeypatch, drafts, [script_of(["x" * (4 * i) + ANSWER], real[1]) for i in range(40)])
    seen, step = [], e.Engine.step

    def recording(self):
        seen.append((len(self.slots), sum(slot is not None for slot in self.slots)))
        return step(self)

    monkeypatch.setattr(e.Engine, "step", recording)
    e.complete(*real, drafts, args, {})
    assert seen[0] == (48, 33) and max(live for _, live in seen) == 33
    assert all(rows == e.round_up(live, e.ROWS) for rows, live in seen if live) and seen[-1][0] == 16
    assert len(seen) < 33 * 4 + 2 * len(ANSWER) + 40 * 4  # slots were refilled at once


def test_tools_run_while_other_slots_decode(real, monkeypatch):
    """The first draft's tool waits for the second draft's second call: a sampler in turns would never get there."""
    event = threading.Event()

    def wait(code):
        if "99" in code:
            event.set()
        return ToolResult(str("1" in code or event.wait(20)), True, None, 0.0)

    args = RolloutArgs(num_generations=1, max_completion_length=300)
    tokenizer = real[1]
    drafts = drafts_of([question(0), question(1)], tokenizer, args)
    text = {True: c.encode(tokenizer, c.result_text(["True"], tokenizer, "tags"))}[True]
    first = c.encode(tokenizer, "<python>2</python>") + text + c.encode(tokenizer, ANSWER)
    second = [*c.encode(tokenizer, "<python>1</python>"), *text, *c.encode(tokenizer, "<python>991</python>"), *text]
    scripted(monkeypatch, drafts, [first, second + c.encode(tokenizer, ANSWER)])
    e.complete(*real, drafts, args, {"python": wait})
    assert [call.result for d in drafts for call in d.calls] == ["True"] * 3


def test_a_branch_copies_the_rows_of_its_parent(real, monkeypatch):
    """Nothing of a branch is prefilled; what it copies was computed once, for the parent."""
    tokenizer = real[1]
    monkeypatch.setattr(branching, "branch_probability", lambda *_: 1.0)
    flags = dict(num_generations=5, branching="arpo", initial_rollouts=2, max_completion_length=700, tool_workers=1)
    args = RolloutArgs(**flags, rollout_batch_size=2)
    tree = branching.plant(question(0), tokenizer, args, (0,))
    seeds = [seed_of(0, "0", i) for i in range(5)]
    script = script_of([LONG, CALL, ANSWER], tokenizer)
    noise = scripted_noise(dict.fromkeys(seeds, script))
    monkeypatch.setattr(e, "gumbel_noise", noise)
    more = lambda: branching.grow(tree, tokenizer, args, (0,))  # noqa: E731
    counts = e.complete(*real, list(tree.drafts), args, {"python": echo}, more)
    assert [(d.parent, d.finish) for d in tree.drafts] == [(None, "eos")] * 2 + [(0, "eos"), (1, "eos"), (0, "eos")]
    assert all(d.ids == tree.drafts[0].ids and d.cache is None for d in tree.drafts) and not tree.forks
    prompt, (long, short) = tree.drafts[0].prompt_len, (end for who, _, end, _ in tree.drafts[0].segments if who == "tool")
    assert [d.inherited for d in tree.drafts] == [0, 0, long, long, short]
    result = len(c.encode(tokenizer, c.result_text([echo("99").text], tokenizer, "tags")))
    assert counts["copied"] == (prompt - 1) + 2 * (long - 1) + (short - 1)
    assert counts["prefilled"] == (prompt - 1) + 2 * result  # the long result of each of the two that ran its call
    assert counts["sampled"] == sum(sum(d.mask[d.inherited :]) for d in tree.drafts)


def test_a_growing_tree_is_the_same_as_under_generate(real, monkeypatch):
    """arpo in float32: real entropies, scripted turns; whatever the number of slots and whoever comes first."""
    tokenizer = real[1]
    turns = [[CALL, CALL, ANSWER], [CALL, ANSWER], [ANSWER], [CALL, LONG, CALL, ANSWER]]
    questions = [question(i, 1 + i % 2) for i in range(4)]
    scripts = {}
    for q in questions:
        for i in range(8):
            scripts[seed_of(0, q.id, i)] = script_of(turns[(int(q.id) + i) % 4 if i < 4 else 0], tokenizer)
    noise = scripted_noise(scripts)
    monkeypatch.setattr(hf, "gumbel_noise", noise)
    monkeypatch.setattr(e, "gumbel_noise", noise)

    def run(engine, slots):
        flags = dict(num_generations=8, initial_rollouts=4, branching="arpo", max_completion_length=330)
        args = RolloutArgs(**flags, engine=engine, rollout_batch_size=slots)
        return [t.to_json() for t in r.rollout(*real, questions, args, {"python": echo}, (0,))]

    slow = run("hf", 64)
    assert run("fast", 64) == slow and run("fast", 5) == slow and run("hf", 3) == slow
    children = [t for t in map(json.loads, slow) if "parent" in t["meta"]]
    assert 4 <= len(children) < 16 and len({t["meta"]["inherited"] for t in children}) > 2


def test_neighbouring_slots_are_grouped_where_that_is_cheaper():
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.choice([0, rng.randrange(1, 130), rng.randrange(1, 5000)]) for _ in range(rng.randrange(1, 40))]
        groups = e.slot_plan(lengths)
        covered = [i for first, end, _ in groups for i in range(first, end)]
        assert covered == sorted(set(covered)) and {i for i, n in enumerate(lengths) if n} <= set(covered)
        assert all(keys % e.WIDTH == 0 and keys >= max(lengths[a:b]) for a, b, keys in groups)
        cost = sum((b - a) * keys + slot_cache.CALL for a, b, keys in groups)
        alone = sum(e.round_up(n, e.WIDTH) + slot_cache.CALL for n in lengths if n)
        assert cost <= alone
    assert e.slot_plan([30] * 16) == [(0, 16, 64)] and e.slot_plan([4000, 64, 64]) == [(0, 1, 4032), (1, 3, 64)]
    assert e.slot_plan([0, 4000, 0, 64], call=math.inf) == [(1, 4, 4032)]  # as on a GPU


def test_a_model_with_other_attention_is_refused_and_left_as_it_was(real):
    tokenizer = real[1]
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=8, max_window_layers=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="no sliding_window.*use --engine hf"):
        r.rollout(model, tokenizer, [question(0)], RolloutArgs(engine="fast"), {}, (0,))
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("script, more", [(r, {}), (train_rl, {"max_steps": 1, "questions_per_step": 1})])
@pytest.mark.parametrize("kind, named", [("sliding_attention", "sliding_attention"), ("full_attention", "softcap")])
def test_other_attention_is_named_before_any_work(tmp_path, monkeypatch, script, more, kind, named):
    """By the kinds of layers, of which not every model tells the attention function, or by what that is asked for."""
    config = Qwen2Config(
        vocab_size=264, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=8, layer_types=[kind],
    )  # fmt: skip
    attend = slot_cache.attend
    monkeypatch.setattr(slot_cache, "attend", lambda *a, **options: attend(*a, **options | {"softcap": 2.0}))
    (tmp_path / "q.jsonl").write_text('{"id": "q", "question": "1?", "answer": "1"}\n')
    flags = {
        "model_name_or_path": save_with_byte_tokenizer(Qwen2ForCausalLM(config), tmp_path / "m"),
        "data": str(tmp_path / "q.jsonl"), "output" if script is r else "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    with pytest.raises(DataError, match=f"--model_name_or_path .*m: --engine fast has no {named}.*; use --engine hf"):
        script.main(script.Args(**flags, engine="fast", num_generations=2, **more))


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_world_trajectories_equal_those_of_generate_up_to_ties(tmp_path, temperature):
    """500 questions with real tools; where ids part, the two best scores differ by less than 1e-5."""
    if not (ROOT / "data/tiny/model.safetensors").exists():
        pytest.skip("data/tiny holds no model")
    world = [sys.executable, "-m", "data.world"]
    drawn = ["--questions", "500", "--seed", "5", "--output", tmp_path / "q.jsonl"]
    subprocess.run([*world, *drawn], cwd=ROOT, check=True)
    subprocess.run([*world, "--index", tmp_path / "index"], cwd=ROOT, check=True)
    model, tokenizer = load_policy(ModelArgs(model_name_or_path=str(ROOT / "data/tiny")), trainable=False)
    questions = load_questions(str(tmp_path / "q.jsonl"))
    flags = dict(num_generations=1, max_completion_length=256, temperature=temperature, index=str(tmp_path / "index"))
    runs = []
    for engine in ("hf", "fast"):
        args = RolloutArgs(**flags, engine=engine)
        with open_tools(args) as toolbox:
            runs.append(r.rollout(model, tokenizer, questions, args, toolbox, (0,)))
    ties = 0
    for slow, fast, q in zip(*runs, questions):
        if slow.token_ids == fast.token_ids:
            assert slow.finish == fast.finish and len(slow.tool_calls) == len(fast.tool_calls)
            continue
        at = next(i for i, pair in enumerate(zip(slow.token_ids, fast.token_ids)) if pair[0] != pair[1])
        with torch.no_grad():
            scores = model(torch.tensor([slow.token_ids[:at]])).logits[0, -1]
        if temperature:
            seed = start_draft(q, 0, tokenizer, args, (0,)).seed
            position = torch.tensor([at - slow.prompt_len])
            scores = scores + gumbel_noise(torch.tensor([seed]), position, len(scores))[0]
        best = scores.topk(2).values
        assert best[0] - best[1] < 1e-5, (q.id, at)
        ties += 1
    print(f"{ties} of 500 part at a tie; {sum(t.n_calls for t in runs[0])} calls")
    assert ties < 10 and sum(t.n_calls for t in runs[0]) > 250
