"""How a question becomes a prompt (`render_prompt`), and how a response grows turn by turn (`Draft`).

Shared by every sampler (rollout.py) and by train_sft.py, so that all of them build the same ids, masks and spans: a
`Draft` grows segment by segment, each tokenised once, and becomes a `Trajectory` when it is finished.
"""

import json
import re
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from core.distributed import say_once
from core.parse import escape_result, format_error, is_tag, parse_calls, render_call, render_result, spans_of
from core.trajectory import DataError, Question, Span, ToolCall, Trajectory

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
BOXED = {  # what both prompts add for math
    "tags": ", with the result in \\boxed{}.",
    "hermes": " In the answer, write the result once, in \\boxed{}.",
}
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
# The calibration world's (data/world/tokenizer.py): its models have learned the dialects and take no instructions.
INBORN = "instructions: in the weights"  # a comment of chat templates that show none on purpose, as the world's


# ---------------------------------------------------------------------------------------------------- prompts


def render_prompt(question: Question, tokenizer: PreTrainedTokenizerBase, dialect: str, boxed: bool = False) -> str:
    """The chat prompt that rollout, SFT and evaluation share, for `encode` (see `literal`).

    A row's own system message comes before ours; with tags it replaces ours if it names the <answer> tag itself. Where
    the chat template has no place for a system message, both open the user's message. boxed: ask for \\boxed whatever
    the task.
    """
    system = SYSTEM_PROMPTS[dialect] + (BOXED[dialect] if boxed or question.task == "math" else "")
    if question.system:
        own = dialect == "tags" and "<answer>" in question.system
        system = question.system if own else f"{question.system}\n\n{system}"
    asked, tools = literal(question.question, tokenizer), schemas_of(question, dialect)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": asked}]
    refused = None
    try:
        prompt = render(messages, tokenizer, tools)
        if system.strip() in prompt or INBORN in str(tokenizer.chat_template):
            return prompt
    except DataError as e:
        refused = e
    prompt = render([{"role": "user", "content": f"{system}\n\n{asked}"}], tokenizer, tools)
    if system.strip() not in prompt:
        raise refused or DataError(f"{named(tokenizer)} drops the instructions, in system and in user messages")
    return prompt


def schemas_of(question: Question, dialect: str) -> list[dict] | None:
    """The functions declared to the model: the row's own, else our tools in the hermes dialect, else none."""
    return question.tools or (TOOL_SCHEMAS if dialect == "hermes" else None)


def result_text(
    results: list[str],
    tokenizer: PreTrainedTokenizerBase,
    dialect: str,
    tools: list[dict] | None = None,
    names: list[str] | None = None,
) -> str:
    """What stands between a turn's end and the next turn: the tool results in the dialect's frame, for `encode`.

    tools: `schemas_of` the question, because templates frame results by them. names: of the functions called.
    """
    if dialect == "tags":
        return "".join(f"\n{literal(render_result(text), tokenizer)}\n" for text in results)
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": TURN}]
    for k, (text, name) in enumerate(zip(results, names or ["tool"] * len(results), strict=True)):
        said = {"name": escape_result(name), "content": escape_result(text)}  # the name is the model's
        messages.append({"role": "tool", "tool_call_id": f"call{k:05}", **literal(said, tokenizer)})
    return render(messages, tokenizer, tools).partition(TURN)[2].removeprefix(turn_end(tokenizer))


# ---------------------------------------------------------------------------------------------------- templates

# Noncharacters of Unicode, which no text has: where `encode` cuts, and what stands for a turn in a rendered chat.
CUT, TURN = "\ufdd0", "\ufdd1"
OPENING = re.compile(r"<think>\s*(?:</think>\s*)?\Z")  # of a response, written by a chat template
NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def render(
    messages: list[dict], tokenizer: PreTrainedTokenizerBase, tools: list[dict] | None = None, opening: bool = True
) -> str:
    """A chat in the model's template, up to the opening of the next turn; DataError in one line if it refuses.

    Where the template prints the time, it is the beginning of the day of `--date`.
    """
    day = date.fromisoformat(getattr(tokenizer, "date", "") or str(date.today()))
    try:
        template = tokenizer.get_chat_template(tools=tools)
        template = NOW.sub(lambda call: json.dumps(day.strftime(call[2])), template)
        return tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, add_generation_prompt=opening, tokenize=False
        )
    except (TemplateError, ValueError, TypeError) as e:
        roles = ", ".join(m["role"] for m in messages)
        raise DataError(f"{named(tokenizer)} refuses a chat of {roles}: {' '.join(str(e).split())}") from None


def named(tokenizer: PreTrainedTokenizerBase) -> str:
    """How errors call a chat template."""
    return f"--model_name_or_path {tokenizer.name_or_path}: its chat template"


def check_template(question: Question, tokenizer: PreTrainedTokenizerBase, dialect: str) -> None:
    """DataError if the chat template does not fit the hermes dialect: a right answer would count as malformed.

    It has to name every declared function, may not write calls in another form than ours, and (unless the calls are
    the answer) shows results so that the parser finds them.
    """
    if dialect != "hermes":
        return
    function = question.task == "function"
    way_out = "a model with a template like Qwen's or Hermes' works" + (", or --dialect tags" if not function else "")
    tools, chat = schemas_of(question, dialect), [{"role": "user", "content": "Q"}]
    shown = check_declared(chat, tools, tokenizer, way_out)
    call = ToolCall(_name(tools[0]), {})
    asked = {"id": "call00000", "type": "function", "function": {"name": call.name, "arguments": {}}}
    turn = render([*chat, {"role": "assistant", "content": "", "tool_calls": [asked]}], tokenizer, tools, False)
    written = [c.name for c in parse_calls(turn, dialect)]
    if turn.count(call.name) > shown.count(call.name) and written[-1:] != [call.name]:
        raise DataError(f"{named(tokenizer)} writes calls in another form than <tool_call> and JSON; {way_out}")
    frame = result_text(["391"], tokenizer, dialect, tools, [call.name])
    example = render_call(call, dialect) + split_opening(frame)[0] + "so 391"
    if not function and ("391" not in frame or format_error(example, dialect, "qa")):
        raise DataError(f"{named(tokenizer)} does not show results between tags as <tool_response>; {way_out}")


def check_declared(chat: list[dict], tools: list[dict], tokenizer: PreTrainedTokenizerBase, way_out: str) -> str:
    """The chat rendered with its functions; DataError, with a way out, if the template names one of them not at all."""
    shown, bare = render(chat, tokenizer, tools), render(chat, tokenizer)
    missing = [name for name in map(_name, tools) if shown.count(name) <= bare.count(name)]
    if missing:
        raise DataError(f"{named(tokenizer)} does not declare functions, such as {missing[0]!r}; {way_out}")
    return shown


def _name(schema: dict) -> str:
    return schema.get("function", schema).get("name", "")


@lru_cache(maxsize=4)
def turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that the chat template writes after the model's turn; the eos token if it writes none there."""
    try:
        chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": TURN}]
        after = render(chat, tokenizer, opening=False).partition(TURN)[2].lstrip()
    except DataError:
        after = ""
    tokens = (token.content for token in tokenizer.added_tokens_decoder.values())
    return max((token for token in tokens if after.startswith(token)), key=len, default=tokenizer.eos_token)


def split_opening(text: str) -> tuple[str, str]:
    """(text, what the template wrote at its end of the model's turn: an opened or an empty think block, or "")."""
    at = OPENING.search(text)
    return (text[: at.start()], at[0]) if at else (text, "")


def forced_opening(written: str, mode: str) -> list[str]:
    """How a turn opens whose opening the template may have `written`, piece by piece, if `--mode` is to hold."""
    if mode == "no_think" and written and "</think>" not in written:  # as the model would close it
        return [written, NO_THINK.removeprefix(written) if NO_THINK.startswith(written) else "</think>\n\n"]
    if mode == "auto" or written and ("</think>" in written) == (mode == "no_think"):
        return [written] if written else []
    return [PREFIXES[mode]]


def behind_opening(text: str, written: str) -> str:
    """What follows the opening that the template has `written` in a turn of this text; ValueError if nothing can."""
    thinks = re.match(r"\s*<think>\s*", text)
    if not written or text.startswith(written):
        return text[len(written) :]
    if "</think>" not in written:  # a turn without a thought closes the block at once
        return text[thinks.end() :] if thinks else forced_opening(written, "no_think")[1] + text
    if thinks and mode_of(text) == "think":
        raise ValueError("a turn that thinks, but the chat template opens every turn with an empty think block")
    return re.sub(r"\A\s*<think>\s*</think>\s*", "", text)


# ---------------------------------------------------------------------------------------------------- text and ids


@lru_cache(maxsize=4)
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """Finds where a control token begins: a special one, or one of the chat template's that is no tag of the dialects.

    Questions may name the tags; in results `escape_result` has taken them apart.
    """
    added = tokenizer.added_tokens_decoder.values()
    written = [t.content for t in added if t.special or (t.content in str(tokenizer.chat_template))]
    tokens = [re.escape(t) for t in written if not (is_tag(t) or t.isspace() or t.isalnum() or len(t) < 2)]
    return re.compile(rf"(?=(?:{'|'.join(tokens)})).", re.DOTALL) if tokens else re.compile(r"(?!)")


def literal(value: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Text of users and tools, or a message of it, with a CUT inside whatever would become a control token.

    `encode` reads that as text.
    """
    if isinstance(value, dict):
        return {key: literal(inner, tokenizer) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner, tokenizer) for inner in value]
    if not isinstance(value, str):
        return value
    return control_tokens(tokenizer).sub(lambda first: first[0] + CUT, value.replace(CUT, ""))


def encode(tokenizer: PreTrainedTokenizerBase, text: str, start: bool = False) -> list[int]:
    """Ids of text of a conversation: no special tokens are added, and the pieces between CUTs share no token.

    Only at its `start` may the tokenizer put a space in front, as SentencePiece's do.
    """
    ids = []
    for i, piece in enumerate(text.split(CUT)):
        before = _ids("\n", tokenizer) if adds_space(tokenizer) and not (start and i == 0) else []
        found = _ids("\n" + piece, tokenizer) if before else []
        follows = before and found[: len(before)] == before
        ids += found[len(before) :] if follows else _ids(piece, tokenizer)
    return ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Text of ids inside a conversation, with the space that SentencePiece's decoders drop at the start of a text."""
    if not adds_space(tokenizer):
        return tokenizer.decode(ids)
    before = _ids("x", tokenizer)
    return tokenizer.decode(before + ids).removeprefix(tokenizer.decode(before))


@lru_cache(maxsize=4)
def adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a space in front of every text, so that its pieces are not those of the whole."""
    alone = _ids("x", tokenizer)
    return _ids("\nx", tokenizer)[-len(alone) :] != alone


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def dialect_of(question: Question, default: str) -> str:
    """Questions that declare functions are asked in the hermes dialect."""
    return "hermes" if question.task == "function" else default


def show_prompt(question: Question, tokenizer: PreTrainedTokenizerBase, default: str) -> None:
    """Print the prompt of a question as the model reads it, its first 2000 characters, once per process."""
    prompt = render_prompt(question, tokenizer, dialect_of(question, default)).replace(CUT, "")
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

    def add_segment(self, who: str, ids: list[int], text: str, logp: list[float] | None = None) -> None:
        """Add one segment: `model` ids are trained on, `tool` and `given` ids are not. logp: the sampler's, if kept."""
        self.segments.append((who, len(self.ids), len(self.ids) + len(ids), text))
        if logp is not None:
            self.logp += [0.0] * (len(self.ids) - len(self.logp)) + logp
        self.ids += ids
        self.mask += [int(who == "model")] * len(ids)

    def write(self, who: str, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Add one segment of text, which is kept as its ids read (some tokenizers normalise)."""
        if ids := encode(tokenizer, text):
            self.add_segment(who, ids, decode(tokenizer, ids))


def open_draft(
    question: Question,
    tokenizer: PreTrainedTokenizerBase,
    dialect: str,
    i: int = 0,
    seed: int = 0,
    mode: str = "auto",
    boxed: bool = False,
) -> Draft:
    """A draft whose response is still empty, or holds what a forced mode or the chat template opens it with.

    A <think> that the template writes at the end of its prompt belongs to the response: it is `given`, not prompt.
    """
    prompt, written = split_opening(render_prompt(question, tokenizer, dialect, boxed))
    ids = encode(tokenizer, prompt, start=True)
    draft = Draft(question, i, dialect, seed, ids, len(ids))
    for piece in forced_opening(written, mode):
        draft.write("given", piece, tokenizer)
    return draft


def results_segments(
    results: list[str], names: list[str], draft: Draft, tokenizer: PreTrainedTokenizerBase, mode: str = "auto"
) -> list[tuple[str, list[int]]]:
    """(who, ids) of what answers a turn's calls: the results in their frame, and the opening of the next turn."""
    tools = schemas_of(draft.question, draft.dialect)
    text, written = split_opening(result_text(results, tokenizer, draft.dialect, tools, names))
    opening = forced_opening(written, mode) if written else []
    return [("tool", encode(tokenizer, text)), *(("given", encode(tokenizer, piece)) for piece in opening)]


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
        now = decode(tokenizer, ids[first:n])
        whole = now.rstrip("\ufffd")
        starts.append(at + len(whole) - known)
        if n > read and whole == now:
            at, first, read = starts[-1], read, n
            known = len(decode(tokenizer, ids[first:read]))
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
    if token < len(ids):  # ids without text at the end: of the embedding's padding
        spans = spans or [Span("text", offset, offset)]
        spans[-1].end = offset + len(ids)
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
