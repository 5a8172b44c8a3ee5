"""Conversations with tools: prompts, drafts of trajectories, and what a tool call is answered with.

Shared by every sampler (rollout.py) and by train_sft.py, so that all of them build the same ids, masks and spans: a
`Draft` grows segment by segment, each tokenised once, and becomes a `Trajectory` when it is finished.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from core.args import arg, check_numbers, require_positive
from core.parse import escape_result, parse_calls, render_result, spans_of
from core.run import seed_of
from core.trajectory import DataError, Span, ToolCall, Trajectory
from data.questions import Question
from data.world.noise import NoisyIndex
from tools.sandbox import PythonSandbox, ToolResult
from tools.search import SearchClient, SearchError, SearchIndex, run_search

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


@dataclass
class RolloutArgs:
    """Flags of sampling and tools; train_rl.py, flywheel.py and eval/evaluate.py share them."""

    engine: Literal["hf", "fast", "openai"] = arg(
        "hf", "sampler: hf = generate, the reference; fast = engines/fast.py; openai = a server (not in RL)"
    )
    base_url: str = arg("", "engine openai: the server, such as http://localhost:8000/v1; key in OPENAI_API_KEY")
    served_model_name: str = arg("", "engine openai: the model's name there; default: --model_name_or_path")
    num_generations: int = arg(8, "G, trajectories per question")
    branching: Literal["none", "random", "arpo", "threshold"] = arg(
        "none", "start fewer and branch after tool results (ARPO): by the rise of entropy, or with p = 0.5 (random)"
    )
    initial_rollouts: int = arg(0, "N0, rollouts that branching starts with; 0 = half of G (ARPO: 8 of 16)")
    max_prompt_length: int = arg(2048, "longest prompt, in tokens; a longer one is an error before any work")
    max_completion_length: int = arg(512, "response budget in tokens, tool results included")
    temperature: float = arg(1.0, "sampling temperature; 0 = greedy (not in RL)")
    top_p: float = arg(1.0, "nucleus sampling (flywheel and evaluation only)")
    top_k: int = arg(0, "top-k sampling, 0 = off (flywheel and evaluation only)")
    repetition_penalty: float = arg(1.0, "repetition penalty (flywheel and evaluation only)")
    mode: Literal["auto", "think", "no_think"] = arg("auto", "force a think block, force none, or let the model choose")
    dialect: Literal["tags", "hermes"] = arg("tags", "call format; questions of task function always use hermes")
    max_tool_calling_iterations: int = arg(6, "tool calls per trajectory; one more ends it")
    max_calls_per_tool: int = arg(6, "calls of one tool per trajectory; one more ends it")
    max_tool_seconds: float = arg(60.0, "tool time per trajectory, in seconds; later calls are refused")
    refuse_repeats: bool = arg(False, "refuse the third identical call of a trajectory")
    rollout_batch_size: int = arg(128, "trajectories decoded at once")
    index: str = arg("", "folder of a search index (data.world --index, tools.search), or URL of a search server")
    search_protocol: Literal["flashrag", "search_r1"] = arg("flashrag", "how to talk to the server of --index URL")
    search_top_k: int = arg(4, "passages per search")
    search_max_chars: int = arg(1200, "characters kept of each passage")
    noise: float = arg(0.0, "world's index only: scale 0 to 1 of wrong and ambiguous passages (data/world/noise.py)")
    noise_seed: int = arg(0, "draws which wordings of a query are answered with a flaw")
    check: bool = arg(False, "keep the sampler's log-probs; train_rl.py verifies every step's invariants with them")
    python_timeout: float = arg(5.0, "seconds per python call")
    python_memory_mb: int = arg(512, "memory per python call")
    tool_workers: int = arg(2, "tool calls run at once")

    def __post_init__(self):
        check_numbers(self)
        require_positive(self, "num_generations", "max_completion_length", "rollout_batch_size", "tool_workers")
        require_positive(self, "search_top_k", "search_max_chars", "python_memory_mb")
        if self.temperature == float("inf"):
            raise ValueError("--temperature must be finite, not inf")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must be in (0, 1], not {self.top_p}")
        if not 0 <= self.noise <= 1:
            raise ValueError(f"--noise must be from 0 to 1, not {self.noise}")
        if self.noise and (not self.index or is_url(self.index) or self.search_top_k != 1):
            raise ValueError(f"--noise {self.noise} needs a folder as --index and --search_top_k 1")
        if (self.engine == "openai") != is_url(self.base_url):
            raise ValueError(f"--engine {self.engine} does not go with --base_url {self.base_url!r}")
        if self.engine == "fast" and self.repetition_penalty != 1.0:
            raise ValueError(f"--repetition_penalty {self.repetition_penalty} needs --engine hf")
        if self.engine == "openai" and self.branching != "none":
            raise ValueError(f"--branching {self.branching} needs --engine hf or fast, which know the entropies")
        if not 0 <= self.initial_rollouts <= (self.num_generations if self.branching != "none" else 0):
            raise ValueError(
                f"--initial_rollouts {self.initial_rollouts} does not go with --branching {self.branching} and "
                f"--num_generations {self.num_generations}"
            )

    def more_calls(self, extra: int) -> dict[str, int]:
        """The two limits on calls raised by `extra`, for a trajectory that goes on behind an edit or a hint."""
        limits = ("max_tool_calling_iterations", "max_calls_per_tool")
        return {name: getattr(self, name) + extra for name in limits}


# ---------------------------------------------------------------------------------------------------- tools

ToolBox = dict[str, Callable[[Any], ToolResult]]  # name -> (its text; a dict if its schema has several parameters)


@contextmanager
def open_tools(args: RolloutArgs) -> Iterator[ToolBox]:
    """The tools a model may call: python always, search if `--index` is given (else says so). Closed on exit."""
    with ExitStack() as stack:
        sandbox = stack.enter_context(PythonSandbox(args.python_timeout, args.python_memory_mb, args.tool_workers))
        toolbox: ToolBox = {"python": sandbox.run}
        if args.index:
            toolbox["search"] = search_tool(args)
        else:
            print("tools: python; without --index a search is answered with an error")
        yield toolbox


def search_tool(args: RolloutArgs) -> Callable[[str], ToolResult]:
    """Search in the folder or at the server of `--index`. DataError if there is none.

    An index in memory is so fast that its time counts as 0: what is written does not depend on the machine.
    """
    check_index(args)
    if is_url(args.index):
        return partial(search_at_server, _asked(lambda: SearchClient(args.index, args.search_protocol), args), args)
    index = SearchIndex.load(args.index)
    if args.noise:
        index = NoisyIndex(index, args.noise, args.noise_seed)
    return lambda query: replace(run_search(index, query, args.search_top_k, args.search_max_chars), seconds=0.0)


def search_at_server(client: SearchClient, args: RolloutArgs, query: str) -> ToolResult:
    """One search. DataError if the server is gone: a policy must not learn from that; the same command goes on later."""
    result = run_search(client, query, args.search_top_k, args.search_max_chars)
    if not result.ok:  # this query's matter, if the server still answers
        _asked(client.check_health, args)
    return result


def _asked(question: Callable[[], Any], args: RolloutArgs) -> Any:
    try:
        return question()
    except SearchError as e:
        raise DataError(f"--index {args.index}: {e}") from None


def check_index(args: RolloutArgs) -> None:
    """DataError if `--index` names a folder that is not there; before any work starts."""
    if not has_index(args):
        raise DataError(f"--index {args.index}: no such folder")


def has_index(args: RolloutArgs) -> bool:
    """False if `--index` names a folder that is not on this machine."""
    return not args.index or is_url(args.index) or Path(args.index).is_dir()


def is_url(place: str) -> bool:
    """Whether a flag's value is a server's address, not a folder."""
    return place.startswith(("http://", "https://"))


def run_call(call: ToolCall, earlier: list[ToolCall], toolbox: ToolBox, args: RolloutArgs) -> ToolCall:
    """The call with its result filled in. A malformed, refused or failed call gets an answer too (ok False)."""
    if not call.ok:
        return ToolCall(call.name, call.arguments, f"error: {call.error}", False, call.error)
    same = sum(c.name == call.name and c.arguments == call.arguments for c in earlier)
    refusal = None
    if call.name not in toolbox:
        refusal = f"no tool named {call.name}"
    elif args.refuse_repeats and same >= 2:
        refusal = "refused: the same call was made twice before"
    elif sum(c.seconds for c in earlier) >= args.max_tool_seconds:
        refusal = "refused: the tool time of this question is used up"
    if refusal:
        return ToolCall(call.name, call.arguments, f"error: {refusal}", False, refusal)
    given = call.arguments
    if isinstance(given, dict) and len(parameters_of(call.name)) < 2:  # hermes: {"query": …} or {"code": …}
        if len(given) != 1 or not isinstance(next(iter(given.values())), str):
            error = f"{call.name} takes one text argument"
            return ToolCall(call.name, call.arguments, f"error: {error}", False, error)
        given = next(iter(given.values()))
    result = toolbox[call.name](given)
    return ToolCall(call.name, call.arguments, result.text.rstrip("\n"), result.ok, result.error, result.seconds)


def parameters_of(name: str) -> dict[str, dict]:
    """The parameters that TOOL_SCHEMAS declares of a tool; none if it is not there."""
    schemas = (schema["function"] for schema in TOOL_SCHEMAS)
    return next((schema["parameters"]["properties"] for schema in schemas if schema["name"] == name), {})


# ---------------------------------------------------------------------------------------------------- prompts


def render_prompt(question: Question, tokenizer: PreTrainedTokenizerBase, dialect: str) -> str:
    """The chat prompt that rollout, SFT and evaluation share.

    A row's own system message replaces ours in the hermes dialect, whose template explains the calls; elsewhere ours
    follows it, unless it names the <answer> tag itself.
    """
    ours = SYSTEM_PROMPTS[dialect] + (BOXED if question.task == "math" else "")
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


def dialect_of(question: Question, args: RolloutArgs) -> str:
    """Questions that declare functions are asked in the hermes dialect."""
    return "hermes" if question.task == "function" else args.dialect


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


def start_draft(q: Question, i: int, tokenizer: PreTrainedTokenizerBase, args: RolloutArgs, run: tuple) -> Draft:
    """Draft of sample i of a question, its prompt (and a forced mode's opening) in place; DataError if too long."""
    dialect = dialect_of(q, args)
    prompt = encode(tokenizer, render_prompt(q, tokenizer, dialect))
    if len(prompt) > args.max_prompt_length:
        raise DataError(
            f"question {q.id!r}: its prompt has {len(prompt)} tokens, more than --max_prompt_length "
            f"{args.max_prompt_length}"
        )
    draft = Draft(q, i, dialect, seed_of(*run, q.id, i), prompt, len(prompt))
    if opening := PREFIXES[args.mode]:
        draft.append("given", encode(tokenizer, opening), opening)
    return draft


def check_prompts(
    questions: list[Question], tokenizer: PreTrainedTokenizerBase, args: RolloutArgs, model: Any = None
) -> None:
    """Raise DataError for the first question whose prompt is too long, before any work.

    So is one that leaves less room among the model's positions than `--max_completion_length`.
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for q in questions:
        prompt = start_draft(q, 0, tokenizer, args, ()).prompt_len
        if positions and prompt + args.max_completion_length > positions:
            raise DataError(
                f"question {q.id!r}: its prompt of {prompt} tokens and --max_completion_length "
                f"{args.max_completion_length} are more than the model's {positions} positions"
            )


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
    """no_think if the response opens with an empty think block or with none at all."""
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
