"""Branching rollouts: probabilities by hand, decisions of a scripted model, exact budgets, shared prefixes.

    python -m pytest tests/test_branching.py        (both engines against each other: tests/test_engine.py)
"""

from math import log

import pytest
import torch
from tiny_models import ScriptedModel, byte_tokenizer

import rollout as r
from core.model import ModelArgs, load_policy
from core.run import seed_of
from core.trajectory import Question
from engines import branching as b
from engines import fast as e
from engines import hf
from engines.hf import OpeningEntropy
from grpo.metrics import tokens_saved
from rollout import RolloutArgs
from tools.sandbox import ToolResult

TOKENIZER = byte_tokenizer()
CALL = "<think>so</think>\n<python>print(2)</python>"
ANSWER = "\n<think>it must be two</think>\n<answer>\\boxed{2}</answer>"
RESULT = "\n<result>\n2\n</result>\n"


@pytest.fixture(scope="module")
def real(tiny_model):
    return load_policy(ModelArgs(model_name_or_path=str(tiny_model)), trainable=False)


def question(i="q"):
    return Question(i, "1+1?", "2", "math")


class Unsure(ScriptedModel):
    """A scripted model whose next-token entropy, as a share of ln V, is level(response so far)."""

    def __init__(self, script, level):
        super().__init__(TOKENIZER, script)
        self.level = level

    def generate(self, input_ids, attention_mask, logits_processor, **rest):
        out = super().generate(input_ids=input_ids, attention_mask=attention_mask, **rest)
        texts = [
            self.tokenizer.decode([i for i, m in zip(ids, mask) if m]).partition("assistant\n")[2]
            for ids, mask in zip(input_ids.tolist(), attention_mask.tolist())
        ]
        scores = torch.tensor([self.level(text) for text in texts])[:, None]  # (B, 1), see `sample`
        for _ in range(out.shape[1] - input_ids.shape[1]):
            for processor in logits_processor:
                if isinstance(processor, OpeningEntropy):
                    processor(None, scores)
        return out


def sample(monkeypatch, script, level=lambda response: 0.5, coins=None, questions=(question(),), **flags):
    """Trajectories of `questions`; coins: (sample index, results) -> the uniform number drawn there."""
    monkeypatch.setattr(hf, "entropy_share", lambda scores: scores[:, 0])
    indices = {seed_of(0, q.id, i): i for q in questions for i in range(64)}

    def seeds(*parts):
        if coins is not None and "branch" in parts:
            return int(coins(indices[parts[0]], parts[2]) * 2**63)
        return seed_of(*parts)

    monkeypatch.setattr(b, "seed_of", seeds)
    model, args = Unsure(script, level), RolloutArgs(**{"num_generations": 8, "branching": "arpo"} | flags)
    toolbox = {"python": lambda code: ToolResult("2", True, None, 0.0)}
    return r.rollout(model, TOKENIZER, list(questions), args, toolbox, (0,))


def two_calls(response):
    return [CALL, CALL, ANSWER][response.count("</result>")]


def parents(trajectories):
    return [t.meta.get("parent") for t in trajectories]


def test_probabilities_by_hand():
    p = b.branch_probability
    assert p("arpo", [0.5, 0.5, 0.9], [1.0, 0.75]) == pytest.approx(0.65)  # k = 2: ΔH = 1.75 - 1.0
    assert p("arpo", [0.5, 0.5], [0.25, 0.25, 1.0]) == pytest.approx(0.4)
    assert p("arpo", [0.1] * 99, [0.3] * 99) == pytest.approx(1.0)  # k = 20: 0.5 + 0.2 * 20 * 0.2 = 1.3
    assert p("arpo", [0.3] * 20, [0.1] * 20) == 0.0
    assert p("arpo", [0.3] * 25, [0.3] * 20 + [0.9] * 5) == 0.5  # only the first 20 count
    assert [p("threshold", [0.5], [x]) for x in (0.4, 0.5, 0.6)] == [0.0, 0.0, 1.0]
    assert p("random", [0.1], [0.9]) == p("random", [], []) == 0.5
    assert p("arpo_released", [0.5, 0.5, 0.9], [1.0, 0.75]) == pytest.approx(0.47)  # 0.5 + 0.2 (1.75 − 1.9)
    assert p("arpo_released", [0.3] * 25, [0.3] * 20 + [0.9] * 5) == 0.5


def test_entropy_share_is_in_units_of_the_largest_entropy():
    inf = float("inf")
    scores = torch.tensor([[0.0, 0, 0, 0], [5.0, 5, -inf, -inf], [9.0, -inf, -inf, -inf], [log(3), 0, -inf, -inf]])
    last = (0.75 * log(4 / 3) + 0.25 * log(4)) / log(4)
    assert b.entropy_share(scores).tolist() == pytest.approx([1.0, 0.5, 0.0, last])


def test_a_rollout_branches_where_its_coin_is_below_the_probability(monkeypatch):
    """First segment 0.5; 0.55 after the first result (k = 20, ΔH = 1, p = 0.7), 0.45 after the second (p = 0.3)."""

    def level(response):
        return [0.5, 0.55, 0.45][response.count("</result>")]

    coins = {(0, 1): 0.69, (1, 1): 0.71, (0, 2): 0.31, (1, 2): 0.29, (2, 2): 0.1}
    out = sample(monkeypatch, two_calls, level, lambda i, n: coins[i, n], num_generations=5, initial_rollouts=2)
    # after the first result 0 branches (-> 2), after the second 1 (-> 3) and the child 2 (-> 4)
    assert parents(out) == [None, None, 0, 1, 2]
    first, second = len(CALL + RESULT), len(CALL + RESULT + CALL + RESULT)
    assert [t.meta["inherited"] - t.prompt_len for t in out[2:]] == [first, second, second]
    saved = (len(CALL) + 2 * 2 * len(CALL)) / (5 * len(CALL + CALL + ANSWER))
    assert tokens_saved(out) == pytest.approx(saved)


def test_the_released_code_measures_the_segment_before_the_call(monkeypatch):
    """Segments open at 0.5, 0.55, 0.45 and 0.6 (k = 20). At a trajectory's first own call p = 0.5; root: 0.5, 0.7, 0.3.

    The child that started after the first result has its first segment there (0.55): its first own call (the second of
    the trajectory) is at p = 0.5, its next one at 0.5 + 0.2 · 20 · (0.45 − 0.55) = 0.1.
    """

    def three_calls(response):
        return [CALL, CALL, CALL, ANSWER][response.count("</result>")]

    def level(response):
        return [0.5, 0.55, 0.45, 0.6][response.count("</result>")]

    def grown(coins):
        flags = dict(branching="arpo_released", num_generations=4, initial_rollouts=1)
        return parents(sample(monkeypatch, three_calls, level, lambda i, n: coins.get((i, n), 0.99), **flags))

    assert grown({(0, 1): 0.49}) == [None, 0, None, None] and grown({(0, 1): 0.51}) == [None] * 4
    assert grown({(0, 2): 0.69}) == [None, 0, None, None] and grown({(0, 2): 0.71}) == [None] * 4
    assert grown({(0, 3): 0.29}) == [None, 0, None, None] and grown({(0, 3): 0.31}) == [None] * 4
    assert grown({(0, 1): 0.1, (1, 2): 0.49}) == [None, 0, 1, None]
    assert grown({(0, 1): 0.1, (1, 2): 0.51}) == [None, 0, None, None]
    assert grown({(0, 1): 0.1, (1, 3): 0.09}) == [None, 0, 1, None]
    assert grown({(0, 1): 0.1, (1, 3): 0.11}) == [None, 0, None, None]


def test_threshold_takes_every_rise_and_random_ignores_it(monkeypatch):
    def level(response):
        return 0.5 + 0.01 * response.count("</result>")

    flags = dict(num_generations=4, initial_rollouts=2)
    out = sample(monkeypatch, two_calls, level, lambda i, n: 0.99, branching="threshold", **flags)
    assert parents(out) == [None, None, 0, 1]
    out = sample(monkeypatch, two_calls, lambda _: 0.5, lambda i, n: 0.01, branching="threshold", **flags)
    assert parents(out) == [None] * 4
    out = sample(monkeypatch, two_calls, level, lambda i, n: 0.49 if i else 0.51, branching="random", **flags)
    assert parents(out) == [None, None, 1, 1]  # after the first and after the second result


def test_a_trajectory_has_one_child_per_result_and_a_child_none_at_its_origin(monkeypatch):
    out = sample(monkeypatch, two_calls, coins=lambda i, n: 0.0, num_generations=16, initial_rollouts=2)
    # first result: 0 and 1; second result: 0, 1 and the children 2, 3; the rest from the prompt
    assert parents(out) == [None, None, 0, 1, 0, 1, 2, 3] + [None] * 8
    places = [(t.meta["parent"], t.meta["inherited"]) for t in out[2:8]]
    assert len(set(places)) == 6


@pytest.mark.parametrize("mode", ["none", "random", "arpo", "arpo_released", "threshold"])
@pytest.mark.parametrize("calls", [0, 1, 5])
def test_the_budget_is_exact_whatever_is_called(monkeypatch, mode, calls):
    def script(response, prompt):
        wanted = calls if "odd" in prompt else min(calls, 1)
        return CALL if response.count("</result>") < wanted else ANSWER

    questions = [Question(f"{k}", f"{k} 1+1?", "2", "math") for k in ("odd", "even")]
    for initial in (0, 1, 6):
        flags = dict(branching=mode, num_generations=6, initial_rollouts=initial * (mode != "none"))
        out = sample(monkeypatch, script, lambda s: 0.01 * len(s), questions=questions, **flags)
        assert [(t.question_id, t.sample_idx) for t in out] == [(q.id, i) for q in questions for i in range(6)]
        assert all(t.finish == "eos" and t.sampled for t in out)
        born = [p for p in parents(out) if p is not None]
        if mode == "none" or initial == 6 or not calls:
            assert not born
        elif mode == "threshold":
            assert born


def test_children_share_ids_and_mask_with_their_parent_up_to_the_branch(monkeypatch):
    turns = iter(range(10**6))

    def script(response):
        body = f"{next(turns)}"  # every turn is another text
        return f"<python>{body}</python>" if response.count("</result>") < 3 else f"<answer>\\boxed{{{body}}}</answer>"

    out = sample(monkeypatch, script, num_generations=16, branching="random")
    children = [t for t in out if "parent" in t.meta]
    assert len(children) > 3
    for t in children:
        n, parent = t.meta["inherited"], out[t.meta["parent"]]
        assert t.token_ids[:n] == parent.token_ids[:n] and t.token_ids[n:] != parent.token_ids[n:]
        assert t.loss_mask[:n] == parent.loss_mask[:n] and all(t.loss_mask[n : n + 5])
        ran = sum(s.kind == "tool_result" and s.end <= n for s in t.spans)
        assert ran and t.tool_calls[:ran] == parent.tool_calls[:ran] and t.tool_calls[ran:] != parent.tool_calls[ran:]
        assert t.n_calls == 3 and parent.n_calls == 3


def test_what_starts_from_the_prompt_is_what_plain_sampling_gives(real):
    flags = dict(num_generations=6, max_completion_length=20)
    plain = r.rollout(*real, [question()], RolloutArgs(**flags), {}, (3,))
    for mode in ("random", "arpo"):
        out = r.rollout(*real, [question()], RolloutArgs(**flags, branching=mode), {}, (3,))
        assert [t.to_json() for t in out] == [t.to_json() for t in plain]  # the random model calls no tool


def test_the_measured_entropy_is_that_of_the_scores_sampled_from(real, monkeypatch):
    """Both engines note H / ln V of the tempered distribution at each of the first 20 tokens."""
    model, tokenizer = real
    noted = []
    for module in (hf, e):
        monkeypatch.setattr(module, "note_segment", lambda draft, entropies, mode: noted.append(entropies))
    for engine in ("hf", "fast"):
        flags = dict(num_generations=2, branching="arpo", temperature=0.7, max_completion_length=30, engine=engine)
        args = RolloutArgs(**flags)
        t = r.rollout(model, tokenizer, [question()], args, {}, (0,))[0]
        with torch.no_grad():
            scores = model(torch.tensor([t.token_ids])).logits[0, t.prompt_len - 1 : -1] / 0.7
        p = scores.double().softmax(-1)
        expected = (-(p * p.log()).sum(-1) / log(p.shape[-1]))[: b.OPENING].tolist()
        assert noted[0] == pytest.approx(expected, abs=1e-5) and len(noted[0]) == min(20, t.completion_tokens)
        noted.clear()


def test_bad_flags_are_named():
    with pytest.raises(ValueError, match="--branching random needs --engine"):
        RolloutArgs(engine="openai", base_url="http://x", branching="random")
    for flags in ({"initial_rollouts": 4}, {"branching": "arpo", "initial_rollouts": 9}):
        with pytest.raises(ValueError, match="--initial_rollouts"):
            RolloutArgs(num_generations=8, **flags)
