"""Critics of the flywheel: which step is redundant or flawed, and how its thoughts could be worded [PAPERS A1].

Three critics behind one interface. `model`: prompts to the policy itself or to an OpenAI-compatible endpoint; an answer
that does not keep to the format is refused and counted, never repaired. `rule`: what can be read off the trajectory and
the world's needed calls. `entropy` (ours): the first call that does not lower the reasoning entropy is the redundant
one, the step of highest entropy the flawed one.
"""

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from core.conversation import decode, open_draft, turn_end
from core.model import sampling_mode, token_entropies
from core.parse import parse_calls, spans_of
from core.segments import segment_entropies
from core.trajectory import DataError, Question, Trajectory
from data.world.passages import WORDY
from engines.hf import generate_turn
from eval.behaviour import call_labels, duplicate_calls, unused_calls
from methods.operators import Finding, Step, steps_of, thoughts_of
from tools.client import ServerError, request_json

Refusal = Literal["none", "malformed"]  # nothing to improve | an answer outside the format


class Critic(NamedTuple):
    """Each field takes a list of trajectories and returns one finding or one refusal for each."""

    redundant_step: Callable[[list[Trajectory]], list[Finding | Refusal]]
    flawed_step: Callable[[list[Trajectory]], list[Finding | Refusal]]
    rewrite_thoughts: Callable[[list[Trajectory]], list[list[str] | Refusal]]


# ---------------------------------------------------------------------------------------------------- rule


def rule_critic(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, a: Any) -> Critic:
    """No model: duplicates, unused results and the world's needed calls; failed calls and early answers; its filler."""
    return Critic(
        lambda ts: [_rule_redundant(t, steps_of(t, tokenizer)) for t in ts],
        lambda ts: [_rule_flawed(t, steps_of(t, tokenizer)) for t in ts],
        lambda ts: [_shorter_thoughts(t, steps_of(t, tokenizer), filler=WORDY) for t in ts],
    )


def _rule_redundant(t: Trajectory, steps: list[Step]) -> Finding | Refusal:
    """The first redundant call as eval.behaviour counts them: beyond the need or repeated (world), else also unused."""
    for i, label in enumerate(call_labels(t)):
        if label in ("redundant", "repeated"):
            return _without_call(t, steps, i, known=i in {*duplicate_calls(t), *unused_calls(t)})
    return "none"


def _without_call(t: Trajectory, steps: list[Step], call: int, known: bool) -> Finding | Refusal:
    """Replace the step of a call by the thought that followed its result, where that thought owes nothing to it."""
    if (k := _step_of_call(steps, call)) is None:
        return "none"
    if not known or k + 1 >= len(steps):
        return Finding(k, "")
    text = steps[k + 1].text
    blocks = spans_of(text, t.dialect)
    end = next((start for kind, start, stop in blocks if kind != "think" and text[start:stop].strip()), 0)
    return Finding(k, text[:end].lstrip())


def _step_of_call(steps: list[Step], call: int) -> int | None:
    for k, step in enumerate(steps):
        call -= step.calls
        if call < 0:
            return k
    return None


def _rule_flawed(t: Trajectory, steps: list[Step]) -> Finding | Refusal:
    """The step of the first failed call, else of the first repeated one, else the last, which answered wrongly."""
    bad = [i for i, call in enumerate(t.tool_calls) if not call.ok] or duplicate_calls(t)
    k = _step_of_call(steps, bad[0]) if bad else len(steps) - 1
    return Finding(k, "") if steps and k is not None else "none"


def _shorter_thoughts(t: Trajectory, steps: list[Step], filler: tuple[str, ...] = ()) -> list[str] | Refusal:
    """Thoughts without phrases of `filler`, and without sentences that stood earlier in a thought."""
    seen, texts, changed = set(), [], False
    for thought in thoughts_of(t, steps):
        text = thought.text.strip()
        for phrase in filler:
            text = text.replace(phrase + " ", "")
        sentences = re.split(r"(?<=[.!?\n])\s+", text)
        new = [s for i, s in enumerate(sentences) if s not in seen and s not in sentences[:i]]
        seen |= set(sentences)
        text = " ".join(new) if len(new) < len(sentences) else text
        shorter = 0 < len(text) < len(thought.text.strip())
        changed |= shorter
        texts.append(text if shorter else thought.text)
    return texts if changed else "none"


# ---------------------------------------------------------------------------------------------------- entropy


def entropy_critic(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, a: Any) -> Critic:
    """No prompts: token entropies of the policy itself (PAPERS C1); thoughts lose repeated sentences."""

    def redundant(t: Trajectory, steps: list[Step], H: list[float]) -> Finding | Refusal:
        k = next((k for k in range(len(H) - 1) if H[k + 1] - H[k] >= 0), None)
        if k is None:
            return "none"
        call = sum(step.calls for step in steps[:k])
        return _without_call(t, steps, call, known=call in {*duplicate_calls(t), *unused_calls(t)})

    def flawed(t: Trajectory, steps: list[Step], H: list[float]) -> Finding | Refusal:
        known = [k for k in range(len(H)) if H[k] == H[k]]
        return Finding(max(known, key=lambda k: H[k]), "") if known else "none"

    def each(judge: Callable, ts: list[Trajectory]) -> list[Finding | Refusal]:
        with sampling_mode(model):
            entropies = token_entropies(ts, model, tokenizer.pad_token_id, a.critic_batch_size)
        found = []
        for t, entropy in zip(ts, entropies):
            steps = steps_of(t, tokenizer)
            found.append(judge(t, steps, segment_entropies(t, entropy=entropy) if steps else []))
        return found

    return Critic(
        lambda ts: each(redundant, ts),
        lambda ts: each(flawed, ts),
        lambda ts: [_shorter_thoughts(t, steps_of(t, tokenizer)) for t in ts],
    )


# ---------------------------------------------------------------------------------------------------- model

SYSTEM = "You review how an assistant solved a question with tools. Answer exactly in the format you are asked for."
REDUNDANT = """The solution below reached the right answer. It is cut into numbered steps: each is what the assistant
wrote up to a tool call or the answer. A step is redundant if the solution would end with the same answer without its
tool call or without most of its reasoning: it asks for what is already known, repeats an earlier call, or checks what
is certain.

Question: {question}

{steps}

Find the first redundant step and write it again, shorter: reasoning between <think> and </think>, then the tool call
in the same tags as above, but only if this call is needed. Do not write the final answer. Reply with nothing but

<step>the number of the step</step>
<rewrite>the new step</rewrite>

If no step is redundant, reply with <step>none</step>."""
FLAWED = """The solution below ended with a wrong answer or without one. It is cut into numbered steps: each is what the
assistant wrote up to a tool call or the answer. A step is flawed if it reasons wrongly, misreads a result, makes a bad
tool call, or answers although a call is missing.

Question: {question}

{steps}

Find the first flawed step, say in one or two sentences what is wrong with it, and write it again, corrected:
reasoning between <think> and </think>, then a tool call in the same tags as above if one is needed. Do not write the
final answer. Reply with nothing but

<analysis>what is wrong</analysis>
<step>the number of the step</step>
<rewrite>the new step</rewrite>

If you cannot find a flawed step, reply with <step>none</step>."""
THOUGHTS = """The solution below reached the right answer. Its thoughts stand between <think> and </think>.

Question: {question}

{steps}

Write its {n} thoughts again, clearer and with fewer words, without changing what they conclude; the calls, results
and answer around them will stay as they are. Reply with nothing but the {n} new thoughts in the same order, each as

<thought>the new text</thought>"""

FINDING = re.compile(
    r"(<analysis>.*?</analysis>\s*)?<step>\s*(none|\d{1,4})\s*</step>(?:\s*<rewrite>(.*)</rewrite>)?", re.DOTALL
)
REWRITTEN = re.compile(r"<thought>(.*?)</thought>", re.DOTALL)
CONTROL = re.compile(r"<\|[^|<>\s]{1,64}\|>")  # would become a control token of the critic's prompt


def model_critic(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, a: Any) -> Critic:
    """A model answers three prompts: the policy itself, or the one behind `--critic_base_url` (ET-Agent's: 72B)."""

    def ask(prompts: list[str]) -> list[str]:
        answers = ask_endpoint(prompts, a) if a.critic_base_url else ask_policy(prompts, model, tokenizer, a)
        return [re.sub(r"\A\s*<think>.*?</think>", "", answer, flags=re.DOTALL).strip() for answer in answers]

    def find(template: str, ts: list[Trajectory]) -> list[Finding | Refusal]:
        steps = [steps_of(t, tokenizer) for t in ts]
        answers = ask([template.format(question=t.question, steps=_shown(t, s, tokenizer)) for t, s in zip(ts, steps)])
        return [parse_finding(answer, t, s, template == REDUNDANT) for answer, t, s in zip(answers, ts, steps)]

    def rewrite(ts: list[Trajectory]) -> list[list[str] | Refusal]:
        steps = [steps_of(t, tokenizer) for t in ts]
        counts = [len(thoughts_of(t, s)) for t, s in zip(ts, steps)]
        asked = [i for i, n in enumerate(counts) if n]
        shown = {i: _shown(ts[i], steps[i], tokenizer) for i in asked}
        answers = ask([THOUGHTS.format(question=ts[i].question, steps=shown[i], n=counts[i]) for i in asked])
        found: list[list[str] | Refusal] = ["none"] * len(ts)
        for i, answer in zip(asked, answers):
            found[i] = parse_thoughts(answer, counts[i])
        return found

    return Critic(lambda ts: find(REDUNDANT, ts), lambda ts: find(FLAWED, ts), rewrite)


def parse_finding(answer: str, t: Trajectory, steps: list[Step], redundant: bool) -> Finding | Refusal:
    """Read an answer to REDUNDANT (the rewrite has to be shorter than the step) or FLAWED (with an analysis) strictly.

    A rewrite is a closed thought, a readable call, or one after the other; text outside tags and answers are malformed.
    """
    match = FINDING.fullmatch(answer)
    if not match or (match[2] == "none") != (match[3] is None):
        return "malformed"
    if match[2] == "none":
        return "none"
    k, text = int(match[2]) - 1, match[3].strip()
    if not 0 <= k < len(steps) or bool(match[1]) == redundant:
        return "malformed"
    blocks = [(kind, text[a:b]) for kind, a, b in spans_of(text, t.dialect) if text[a:b].strip()]
    shape = " ".join(kind for kind, _ in blocks)
    calls = "tool_call" if t.dialect == "tags" else "tool_call(?: tool_call)*"
    if not re.fullmatch(f"think|(?:think )?{calls}", shape) or not all(c.ok for c in parse_calls(text, t.dialect)):
        return "malformed"
    if any(kind == "think" and not block.endswith("</think>") for kind, block in blocks):
        return "malformed"
    return "malformed" if redundant and len(text) >= len(steps[k].text.strip()) else Finding(k, text)


def parse_thoughts(answer: str, n: int) -> list[str] | Refusal:
    """Exactly n new thoughts and nothing else."""
    texts = [text.strip() for text in REWRITTEN.findall(answer)]
    return texts if len(texts) == n and all(texts) and not REWRITTEN.sub("", answer).strip() else "malformed"


def _shown(t: Trajectory, steps: list[Step], tokenizer: PreTrainedTokenizerBase) -> str:
    """The response as the critic reads it: numbered steps, and the results between them."""
    parts = []
    for k, step in enumerate(steps):
        parts.append(f"[step {k + 1}]\n{step.text.strip()}")
        if k + 1 < len(steps):
            parts.append(decode(tokenizer, t.token_ids[step.end : steps[k + 1].start]).strip())
    return CONTROL.sub("", "\n".join(parts))


def ask_policy(prompts: list[str], model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, a: Any) -> list[str]:
    """One greedy turn of the policy per prompt; no tag of the prompt or the answer is a tool call here."""
    args = replace(
        a, temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0, max_completion_length=a.critic_max_tokens,
        max_turn_length=0,
    )  # fmt: skip
    drafts = []
    for text in prompts:
        draft = open_draft(Question("", text, "", "qa", system=SYSTEM), tokenizer, "tags")
        draft.dialect = "hermes"  # no stop tags
        drafts.append(draft)
    with sampling_mode(model):
        for at in range(0, len(drafts), a.critic_batch_size):
            generate_turn(model, tokenizer, drafts[at : at + a.critic_batch_size], args)
    answers = ["".join(text for *_, text in d.segments).strip() for d in drafts]
    return [answer.removesuffix(tokenizer.eos_token).removesuffix(turn_end(tokenizer)) for answer in answers]


def ask_endpoint(prompts: list[str], a: Any) -> list[str]:
    """The same prompts to an OpenAI-compatible server; the key comes from the environment (CRITIC_API_KEY).

    DataError if the server cannot be reached or refuses: the same command goes on later, nothing is lost.
    """
    url, key = a.critic_base_url.rstrip("/"), os.environ.get("CRITIC_API_KEY", "none")
    fixed = {"max_tokens": a.critic_max_tokens, "temperature": 0.0, "seed": a.seed}
    fixed |= {"model": a.critic_model} if a.critic_model else {}

    def one(prompt: str) -> str:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
        reply = request_json(f"{url}/chat/completions", {"messages": messages, **fixed}, key, timeout=300, retries=2)
        return reply["choices"][0]["message"]["content"] or ""

    with ThreadPoolExecutor(a.critic_batch_size) as pool:
        try:
            return list(tqdm(pool.map(one, prompts), total=len(prompts), desc="critic", leave=False))
        except ServerError as e:
            raise DataError(f"--critic_base_url {e}") from None
        except (KeyError, IndexError, TypeError) as e:
            raise DataError(f"--critic_base_url {url}: not an answer of a chat endpoint: {e!r}") from None


# name -> (model, tokenizer, args) -> Critic
CRITICS: dict[str, Callable[[torch.nn.Module, PreTrainedTokenizerBase, Any], Critic]] = {
    "model": model_critic,
    "rule": rule_critic,
    "entropy": entropy_critic,
}
