"""The four edits that the flywheel makes of a trajectory where a critic has found a fault [PAPERS A1].

A draft keeps the ids of the kept part verbatim, adds the edit tokenised once and is sampled to its end by rollout.py;
edited model text gets loss_mask 1, an injected hint 0, and `sampled` is False. A new operator is one function and one
line in OPERATORS.
"""

import random
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from core.conversation import (
    Draft,
    behind_opening,
    decode,
    encode,
    mode_of,
    render_prompt,
    split_opening,
    token_starts,
    turn_end,
)
from core.parse import escape_result, parse_calls, spans_of
from core.trajectory import Question, Trajectory

THINK, END_THINK = "<think>", "</think>"
HINTS = {  # appended inside a thought to ask for one more call; lower-case words a small model knows too
    "math": (
        "hmm, not sure, let me check: run code",
        "hmm, let me compute it to be sure",
        "not so sure, let me run code once more",
    ),
    "qa": (
        "hmm, not sure, let me check: search it",
        "hmm, let me look it up to be sure",
        "not so sure, let me search it once more",
    ),
    "function": ("hmm, let me be careful here and call a function",),
}


class Finding(NamedTuple):
    """What a critic says about one step: its number (from 0) and what to write instead ("" = sample it anew)."""

    step: int
    text: str


class Step(NamedTuple):
    """What the model wrote between two tool results: tokens [start, end) of the trajectory, text, number of calls."""

    start: int
    end: int
    text: str
    calls: int


class Thought(NamedTuple):
    """The inside of one closed, non-blank think block: characters [start, end) of the text of a step."""

    step: int
    start: int
    end: int
    text: str


def steps_of(t: Trajectory, tokenizer: PreTrainedTokenizerBase) -> list[Step]:
    """The steps of a trajectory, one more than tool results; [] if its calls do not fit them (it cannot be edited)."""
    bounds, at = [], t.prompt_len
    for span in t.spans:
        if span.kind == "tool_result":
            bounds.append((at, span.start))
            at = span.end
    steps = []
    for start, end in [*bounds, (at, len(t.token_ids))]:
        text = decode(tokenizer, t.token_ids[start:end])
        steps.append(Step(start, end, text, len(parse_calls(text, t.dialect))))
    return steps if sum(s.calls for s in steps) == len(t.tool_calls) else []


def thoughts_of(t: Trajectory, steps: list[Step]) -> list[Thought]:
    """The thoughts that can be rewritten, in order."""
    thoughts = []
    for k, step in enumerate(steps):
        for kind, start, end in spans_of(step.text, t.dialect):
            body = step.text[start + len(THINK) : end - len(END_THINK)]
            if kind == "think" and step.text.endswith(END_THINK, start, end) and body.strip():
                thoughts.append(Thought(k, start + len(THINK), end - len(END_THINK), body))
    return thoughts


# ---------------------------------------------------------------------------------------------------- operators


def replace_step(
    t: Trajectory, question: Question, finding: Finding | None, tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> list[Draft]:
    """Redundant modification and self-correction: the step found is replaced, everything after it is sampled anew."""
    steps = steps_of(t, tokenizer)
    if finding is None or not steps:
        return []
    draft = _up_to(t, question, steps, finding.step, rng, tokenizer)
    if text := _reopened(draft, finding.step, finding.text, tokenizer):
        if parse_calls(text, t.dialect):
            end = turn_end(tokenizer)
            text += end if t.dialect == "hermes" and not text.endswith(end) else ""
        elif not text[-1].isspace():
            text += "\n"
        draft.add_segment("model", encode(tokenizer, text), text)
    return [draft]


def inject_hints(
    t: Trajectory, question: Question, finding: Finding | None, tokenizer: PreTrainedTokenizerBase, rng: random.Random
) -> list[Draft]:
    """Hint injection: a hint after the flawed step and its result, and one just before the answer [2601.06860, 4.1].

    The first only if a flawed step was found and a result came back to it. A hint stands inside a thought that is left
    open, so that the response stays well formed.
    """
    steps, drafts = steps_of(t, tokenizer), []
    if not steps:
        return []
    if finding is not None and finding.step + 1 < len(steps):
        draft = _up_to(t, question, steps, finding.step + 1, rng, tokenizer)
        hint = _reopened(draft, finding.step + 1, THINK + rng.choice(HINTS[t.task]), tokenizer)
        draft.add_segment("given", encode(tokenizer, hint), hint)
        drafts.append(draft)
    last = steps[-1]
    if (at := answer_start(last.text, t)) is not None:
        thoughts = [thought for thought in thoughts_of(t, steps) if thought.step == len(steps) - 1]
        hint = rng.choice(HINTS[t.task])
        if thoughts:
            at, said = thoughts[-1].start + len(thoughts[-1].text.rstrip()), thoughts[-1].text.rstrip()
            hint = (" " if said[-1] in ".,:;!?" else ", ") + hint
        else:
            blank = last.text.find(THINK)  # an empty block: the hint fills it
            at, hint = (blank if 0 <= blank < at else at), THINK + hint
        draft = _up_to(t, question, steps, len(steps) - 1, rng, tokenizer)
        ids = t.token_ids[last.start : last.end]
        starts = [*token_starts(ids, last.text, tokenizer), len(last.text)]
        kept = _floor(starts, at)
        _keep(draft, t, last.start, last.start + kept, tokenizer)
        hint = last.text[starts[kept] : at] + hint
        draft.add_segment("given", encode(tokenizer, hint), hint)
        drafts.append(draft)
    return drafts


def answer_start(text: str, t: Trajectory) -> int | None:
    """Character where the answer of a last step begins, None if it holds no finished answer."""
    if t.finish != "eos":
        return None
    for kind, start, end in spans_of(text, t.dialect):
        if kind == "answer" or (t.dialect == "hermes" and kind != "think" and text[start:end].strip()):
            return start
    return None


def replace_thoughts(
    t: Trajectory,
    question: Question,
    finding: list[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
) -> list[Draft]:
    """Global refinement: only the text inside think blocks changes, everything else stays byte for byte.

    finding: one text per thought of `thoughts_of`. [] (rejected) if nothing changes or more than the thoughts would.
    """
    steps = steps_of(t, tokenizer)
    thoughts = thoughts_of(t, steps)
    if finding is None or len(finding) != len(thoughts) or all(new == old.text for new, old in zip(finding, thoughts)):
        return []
    if any(not new.strip() or escape_result(new) != new for new in finding):
        return []
    draft = _up_to(t, question, steps, 0, rng, tokenizer)
    draft.finish, draft.calls = t.finish, [replace(call) for call in t.tool_calls]
    for k, step in enumerate(steps):
        if k:  # the tool result before the step
            _keep(draft, t, steps[k - 1].end, step.start, tokenizer)
        edits = [(old.start, old.end, new) for old, new in zip(thoughts, finding) if old.step == k and new != old.text]
        _keep_edited(draft, t, step, edits, tokenizer)
    text = "".join(piece for _, _, _, piece in draft.segments)
    return [draft] if _outside_thoughts(text, t) == _outside_thoughts(t.response_text, t) else []


class Operator(NamedTuple):
    """on_correct: works on correct or on incorrect trajectories; ask: the critic's question; edit: the function."""

    on_correct: bool
    ask: Literal["redundant_step", "flawed_step", "rewrite_thoughts"]
    edit: Callable[..., list[Draft]]  # (trajectory, question, finding | None, tokenizer, rng) -> drafts


OPERATORS: dict[str, Operator] = {
    "redundant_modification": Operator(True, "redundant_step", replace_step),
    "global_refinement": Operator(True, "rewrite_thoughts", replace_thoughts),
    "self_correction": Operator(False, "flawed_step", replace_step),
    "hint_injection": Operator(False, "flawed_step", inject_hints),
}


# ---------------------------------------------------------------------------------------------------- pieces of drafts


def _up_to(
    t: Trajectory, question: Question, steps: list[Step], k: int, rng: random.Random, tokenizer: PreTrainedTokenizerBase
) -> Draft:
    """Draft of everything before step k, ids verbatim, with the calls made so far and a sampling seed of its own."""
    prompt = t.token_ids[: t.prompt_len]
    draft = Draft(question, 0, t.dialect, rng.getrandbits(63), prompt, t.prompt_len, sampled=False)
    _keep(draft, t, t.prompt_len, steps[k].start, tokenizer)
    draft.calls = [replace(call) for call in t.tool_calls[: sum(s.calls for s in steps[:k])]]
    return draft


def _reopened(draft: Draft, k: int, text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Open step k as the chat template does, for a new `text` of it ("" = sampled anew); returns what is left of it."""
    asked = k == 0 or draft.dialect == "hermes"  # with tags the template opens the first turn only
    written = split_opening(render_prompt(draft.question, tokenizer, draft.dialect))[1] if asked else ""
    if "</think>" in written and mode_of(text) == "think":  # a thought in place of the template's empty block
        return text
    if written:
        draft.write("given", written, tokenizer)
    return behind_opening(text, written) if text else ""


def _keep(draft: Draft, t: Trajectory, start: int, end: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Append tokens [start, end) of the trajectory as they are, one segment per writer (model, tool, given)."""
    writers = ["model" if m else "given" for m in t.loss_mask[start:end]]
    for span in t.spans:
        if span.kind == "tool_result" and start <= span.start < end:
            writers[span.start - start : span.end - start] = ["tool"] * (span.end - span.start)
    at = 0
    while at < len(writers):
        stop = at + 1
        while stop < len(writers) and writers[stop] == writers[at]:
            stop += 1
        ids = t.token_ids[start + at : start + stop]
        draft.add_segment(writers[at], ids, decode(tokenizer, ids))
        at = stop


def _keep_edited(
    draft: Draft, t: Trajectory, step: Step, edits: list[tuple[int, int, str]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Append a step with characters [a, b) replaced by new text, for each edit in order; the rest keeps its ids."""
    starts = [*token_starts(t.token_ids[step.start : step.end], step.text, tokenizer), len(step.text)]
    at = 0
    for a, b, new in edits:
        left, right = _floor(starts, a), bisect_left(starts, b)
        _keep(draft, t, step.start + at, step.start + left, tokenizer)
        text = step.text[starts[left] : a] + new + step.text[b : starts[right]]
        draft.add_segment("model", encode(tokenizer, text), text)
        at = right
    _keep(draft, t, step.start + at, step.end, tokenizer)


def _floor(starts: list[int], at: int) -> int:
    """Number of whole tokens before character `at`; a character of several tokens is not split."""
    n = bisect_left(starts, at)
    return n if starts[n] == at else bisect_left(starts, starts[n - 1])


def _outside_thoughts(text: str, t: Trajectory) -> list[str]:
    """The text of a response with every thought emptied."""
    return [THINK if kind == "think" else text[start:end] for kind, start, end in spans_of(text, t.dialect)]
