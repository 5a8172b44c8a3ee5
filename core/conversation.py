"""Conversations with tools: prompts, drafts of trajectories, and what a tool call is answered with.

Shared by every sampler (rollout.py) and by train_sft.py, so that all of them build the same ids, masks and spans: a
`Draft` grows segment by segment, each tokenised once, and becomes a `Trajectory` when it is finished.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from core.distributed import say_once
from core.parse import escape_result, parse_calls, render_result, spans_of
from core.trajectory import Question, Span, ToolCall, Trajectory

NO_THINK = "<think>\n\n</think>\n\n"  # an empty block at the start of a response means: answer without thinking
PREFIXES = {"auto": "", "think": "<think>", "no_think": NO_THINK}
SYSTEM_PROMPTS = {
    "tags": (
        "Solve the user's question step by step. Write your reasoning between <think> and </think>. When you need a "
        "fact, write a query between <search> and </search>; when you need a computation, write Python code that "
        "prints its result between <python> and </python>. The tool's output follows between <result> and </result>. "
        "Call a tool only when it helps, at most one per turn. When you are done, write the final answer between "
        "<answer> and </answer>"
    ),
    "hermes": "Think between <think> and </think>, then call a function or answer. Call only what you need.",
}
BOXED = ", with the result in \\boxed{}."
TOOL_SCHEMAS = [  # declared to hermes models for questions that bring no functions of their own
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {key: {"type": "string"}}, "required": [key]},
        },
    }
    for name, key, description in (
        ("search", "query", "Search a text collection; returns the best passages."),
        ("python", "code", "Run Python code; returns what it prints."),
    )
]


# ---------------------------------------------------------------------------------------------------- prompts


def render_prompt(question: Question, tokenizer: PreTrainedTokenizerBase, dialect: str, boxed: bool = False) -> str:
    """The chat prompt that rollout, SFT and evaluation share; boxed: ask for \\boxed whatever the task.

    A row's own system message replaces ours in the hermes dialect, whose template explains the calls; elsewhere ours
    follows it, unless it names the <answer> tag itself.
    """
    ours = SYSTEM_PROMPTS[dialect] + (BOXED if boxed or question.task == "math" else "")
    system = question.system or ours
    if question.system and dialect == "tags" and "<answer>" not in question.system:
        system = f"{question.system}\n\n{ours}"
    schemas = question.tools or (TOOL_SCHEMAS if dialect == "hermes" else None)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question.question}]
    return tokenizer.apply_chat_template(messages, tools=schemas, add_generation_prompt=True, tokenize=False)


def result_text(results: list[str], tokenizer: PreTrainedTokenizerBase, dialect: str) -> str:
    """What stands between a turn's last sampled token and the next turn: the tool results in the dialect's frame."""
    if dialect == "tags":
        return "".join(f"\n{render_result(text)}\n" for text in results)
    mark = "ASSISTANT-TURN"
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": mark}]
    messages += [{"role": "tool", "content": escape_result(text)} for text in results]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return rendered.rsplit(mark, 1)[1].removeprefix(tokenizer.eos_token)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of text that stands inside a conversation: no special tokens are added."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def dialect_of(question: Question, default: str) -> str:
    """Questions that declare functions are asked in the hermes dialect."""
    return "hermes" if question.task == "function" else default


def show_prompt(question: Question, tokenizer: PreTrainedTokenizerBase, default: str) -> None:
    """Print the prompt of a question as the model reads it, its first 2000 characters, once per process."""
    prompt = render_prompt(question, tokenizer, dialect_of(question, default))
    cut = f"\n… ({len(prompt) - 2000} more characters)" if len(prompt) > 2000 else ""
    say_once(f"the prompt of question {question.id!r}:\n{prompt[:2000]}{cut}")


# ---------------------------------------------------------------------------------------------------- drafts


@dataclass
class Draft:
    """One trajectory in the making: ids so far, and the segments they came in."""

    question: Question
    sample_idx: int
    dialect: str
    seed: int
    ids: list[int]
    prompt_len: int
    mask: list[int] = field(default_factory=list)  # of ids; grows with them
    logp: list[float] = field(default_factory=list)  # of ids, as the sampler computed them, 0 elsewhere; with --check
    segments: list[tuple[str, int, int, str]] = field(default_factory=list)  # (model|tool|given, start, end, text)
    calls: list[ToolCall] = field(default_factory=list)
    finish: str | None = None
    sampled: bool = True
    tree: Any = field(default=None, repr=False, compare=False)  # of engines/branching.py, if the draft may branch
    parent: int | None = None  # sample index of the draft it branched off
    inherited: int = 0  # ids copied from there, the prompt included
    cache: Any = field(default=None, repr=False, compare=False)  # what engines/fast.py keeps of the parent until it starts

    def __post_init__(self):
        self.mask = self.mask or [0] * len(self.ids)

    @property
    def response_len(self) -> int:
        """Tokens after the prompt, tool results included: what `max_completion_length` bounds."""
        return len(self.ids) - self.prompt_len

    def append(self, who: str, ids: list[int], text: str, logp: list[float] | None = None) -> None:
        """Add one segment: `model` ids are trained on, `tool` and `given` ids are not. logp: the sampler's, if kept."""
        self.segments.append((who, len(self.ids), len(self.ids) + len(ids), text))
        if logp is not None:
            self.logp += [0.0] * (len(self.ids) - len(self.logp)) + logp
        self.ids += ids
        self.mask += [int(who == "model")] * len(ids)


def to_trajectory(draft: Draft, tokenizer: PreTrainedTokenizerBase) -> Trajectory:
    """The finished record: text and spans by turn, so that every boundary is a token boundary.

    A turn may have several segments (a forced opening, an edit, a hint); a block may begin in one and end in another.
    """
    spans, text, turn, at = [], "", "", draft.prompt_len
    for who, start, end, piece in [*draft.segments, ("tool", len(draft.ids), len(draft.ids), "")]:
        text += piece
        if who != "tool":
            turn += piece
            continue
        spans += token_spans(draft.ids[at:start], at, turn, draft.dialect, tokenizer)
        if start < end:
            spans.append(Span("tool_result", start, end))
        turn, at = "", end
    return Trajectory(
        question_id=draft.question.id,
        sample_idx=draft.sample_idx,
        mode=mode_of(text),
        token_ids=draft.ids,
        prompt_len=draft.prompt_len,
        loss_mask=draft.mask,
        sampled=draft.sampled,
        response_text=text,
        spans=spans,
        tool_calls=draft.calls,
        finish=draft.finish or "length",
        rollout_logp=draft.logp + [0.0] * (len(draft.ids) - len(draft.logp)) if draft.logp else None,
        gold=draft.question.gold,
        question=draft.question.question,
        task=draft.question.task,
        dialect=draft.dialect,
        meta=draft.question.meta
        | ({"tools": draft.question.tools} if draft.question.task == "function" else {})
        | ({"parent": draft.parent, "inherited": draft.inherited} if draft.parent is not None else {}),
    )


def mode_of(response: str) -> str:
    """no_think if the response opens with an empty think block or with none at all (PAPERS, Deviations)."""
    opening = re.match(r"\s*<think>(\s*)", response)
    return "think" if opening and not response.startswith("</think>", opening.end()) else "no_think"


def token_starts(ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where in text, the decoded ids, each token starts; the tokens of one character all start at it."""
    starts, at = [], 0
    for piece in tokenizer.batch_decode([[i] for i in ids]):
        starts.append(at)
        at += len(piece)
    if at == len(text):
        return starts
    starts, at, first, read, known = [], 0, 0, 0, 0  # pieces of one character decode to several marks: go bit by bit
    for n in range(len(ids)):  # ids[:read] are `at` whole characters, the last `known` of them from `first` on: context
        now = tokenizer.decode(ids[first:n])
        whole = now.rstrip("\ufffd")
        starts.append(at + len(whole) - known)
        if n > read and whole == now:
            at, first, read = starts[-1], read, n
            known = len(tokenizer.decode(ids[first:read]))
    return starts


def token_spans(ids: list[int], offset: int, text: str, dialect: str, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """Character spans of one turn as token spans; a token belongs to the span in which it starts.

    A result block in the model's own words is made up: it is text, only the tools' segments are tool results.
    """
    starts = token_starts(ids, text, tokenizer)
    spans, token = [], 0
    for kind, _, end in spans_of(text, dialect):
        first = token
        while token < len(ids) and starts[token] < end:
            token += 1
        if token > first:
            spans.append(Span("text" if kind == "tool_result" else kind, offset + first, offset + token))
    return spans


def turn_text(draft: Draft) -> str:
    """What stands since the last tool result, forced openings, edits and hints included."""
    results = [i for i, (who, *_) in enumerate(draft.segments) if who == "tool"]
    return "".join(piece for *_, piece in draft.segments[max(results, default=-1) + 1 :])


def end_turn(draft: Draft, eos: set[int]) -> list[ToolCall]:
    """Read the calls of the turn just sampled; finish the draft if it has none to run. Returns the calls to run."""
    text, function = turn_text(draft), draft.question.task == "function"
    calls = parse_calls(text, draft.dialect)
    ended = draft.ids[-1] in eos and (draft.dialect == "tags" or not calls)
    if draft.finish is None and (ended or text.rstrip().endswith("</answer>") or function):
        draft.finish = "eos"
    if draft.finish is None:
        return calls
    if not function:  # there the calls are the answer; elsewhere they have not been run
        calls = [replace(call, ok=False, error=call.error or "not run") for call in calls]
    draft.calls += calls
    return []
