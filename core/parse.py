"""Tool calls in a model's text: find them, say exactly what is wrong with them, and check the format of a response.

Two dialects. `tags` (ET-Agent): <think>…</think> <search>query</search> <result>…</result> <python>code</python> …
<answer>…</answer>. `hermes` (Qwen): <tool_call>{"name": …, "arguments": {…}}</tool_call>, several at once, answered by
<tool_response> blocks. One scanner reads both, left to right: a block ends at the first closing tag of its own name,
so what was a call when generation stopped stays one in the finished text. Nothing here raises on any input text.
"""

import ast
import json
import re
import textwrap
import warnings
from collections.abc import Collection
from typing import NamedTuple

from core.trajectory import UNCLOSED, Dialect, SpanKind, Task, ToolCall

TOOL_TAGS = ("search", "python")  # tools that can be called in the `tags` dialect

# Generation pauses after these strings; in `hermes` a turn ends with the model's end-of-sequence token.
STOPS: dict[str, tuple[str, ...]] = {"tags": (*(f"</{tool}>" for tool in TOOL_TAGS), "</answer>"), "hermes": ()}

_KINDS: dict[str, dict[str, SpanKind]] = {
    "tags": {"think": "think", **dict.fromkeys(TOOL_TAGS, "tool_call"), "result": "tool_result", "answer": "answer"},
    "hermes": {"think": "think", "tool_call": "tool_call", "tool_response": "tool_result"},
}
_TAG = {dialect: re.compile(rf"<(/?)({'|'.join(kinds)})>") for dialect, kinds in _KINDS.items()}
# What may stand between the blocks of a well-formed response beside white space: the chat template's own marks.
_CHAT_MARK = re.compile(r"<\|im_start\|>(?:assistant|user|tool)?|<\|im_end\|>|<\|endoftext\|>")
_FENCE = re.compile(r"\A\s*```[\w+-]*[ \t]*\n(.*?)\n?[ \t]*```\s*\Z", re.DOTALL)
# Tags of both dialects and control tokens of common tokenizers (<|im_end|>, </s>, …): a tokenizer would turn the
# text into the token itself.
_ACTIVE = re.compile(
    rf"<(?=/?(?:{'|'.join(TOOL_TAGS)}|think|result|answer|tool_call|tool_response|tools|s|bos|eos|pad|unk)>"
    r"|[|｜][^|｜<>\s]{1,64}[|｜]>)"
)


def is_tag(text: str) -> bool:
    """Whether text is a tag of one of the dialects, opening or closing."""
    return any(tag.fullmatch(text) for tag in _TAG.values())


class Block(NamedTuple):
    """One tagged block of a response, or the untagged text between two of them (name "")."""

    kind: SpanKind
    name: str
    start: int  # character positions, half open, tags included
    end: int
    body: str  # what stands between the tags
    error: str | None  # UNCLOSED | "nested <x> tag" | None


def parse_calls(text: str, dialect: Dialect = "tags", tools: Collection[str] | None = None) -> list[ToolCall]:
    """All tool calls of a response, in order; a malformed one has ok=False and says why in `error`.

    text: the whole response, results included. Tags inside a think block, a result or an answer are no calls.
    tools: names that exist; any other name is the error "unknown tool 'x'" (None: every name of the dialect).
    arguments: the stripped query or code (`tags`), the JSON object (`hermes`), the raw body of a malformed call.
    """
    read = _read_tag_call if dialect == "tags" else _read_hermes_call
    calls = [read(block) for block in _blocks(text, dialect) if block.kind == "tool_call"]
    for call in calls:
        if call.ok and tools is not None and call.name not in tools:
            call.ok, call.error = False, f"unknown tool {call.name[:80]!r}"
    return calls


def parse_call(text: str, dialect: Dialect = "tags", tools: Collection[str] | None = None) -> ToolCall | None:
    """The first tool call, None where no call opens."""
    calls = parse_calls(text, dialect, tools)
    return calls[0] if calls else None


def spans_of(text: str, dialect: Dialect = "tags") -> list[tuple[SpanKind, int, int]]:
    """(kind, start, end) in characters, back to back from 0 to len(text); text between blocks has kind "text".

    A block spans its opening tag to its closing tag; an unclosed one runs to the end of the model's text.
    """
    return [(block.kind, block.start, block.end) for block in _blocks(text, dialect)]


def well_formed(
    text: str, dialect: Dialect = "tags", task: Task = "math", boxed: bool | None = None, strict: bool = False
) -> bool:
    """Whether the response keeps to the format, as the format reward of ET-Agent and AutoTool asks [PAPERS A4, B3].

    A response without any think block is well formed and counts as one without thinking (conversation.mode_of), unless
    `strict`.
    """
    return format_error(text, dialect, task, boxed, strict=strict) is None


def format_error(
    text: str,
    dialect: Dialect = "tags",
    task: Task = "math",
    boxed: bool | None = None,
    tools: Collection[str] | None = None,
    strict: bool = False,
) -> str | None:
    """The first reason why a response is malformed, None if it is well formed.

    tags:   (think? call result)* think? answer, every call readable, nothing nested, only white space between blocks.
    hermes: (think? calls results)* think? text; for task "function" calls may also stand last.
    boxed: exactly one \\boxed in the answer (hermes: in the closing text); None = where the task is math.
    strict: as ET-Agent's code, which also wants a think block (it may be empty) at the start of the response, and boxed
    for every task (here: but function, whose answer is a call).
    What a tool returned never matters: an error is well formed.
    """
    blocks = [b for b in _blocks(text, dialect) if b.kind != "text" or _visible(b.body)]
    for block in blocks:
        if block.error and block.kind in ("think", "answer"):
            return f"{block.error}: <{block.name}>"
    for call in parse_calls(text, dialect, tools):
        if not call.ok:
            return f"{call.error}: {call.name} call"
    shape = "".join(
        {"think": "t", "tool_call": "c", "tool_result": "r", "answer": "a", "text": "x"}[b.kind] for b in blocks
    )
    if dialect == "tags":
        wanted = r"(?:t?cr)*t?a"
    else:
        wanted = r"(?:t?c+r+)*t?(?:c+|x)" if task == "function" else r"(?:t?c+r+)*t?x"
    if not re.fullmatch(wanted, shape):
        return _misplaced(blocks, dialect)
    if strict and shape[0] != "t":
        return "no <think> at the start"
    if (task == "math" or strict and task != "function") if boxed is None else boxed:
        count = blocks[-1].body.count("\\boxed")
        if count != 1:
            return f"{count} \\boxed in the answer"
    return None


def escape_result(text: str) -> str:
    """Make a tool's text harmless inside a result block: a space goes after the "<" of every active tag.

    `</result>` becomes `< /result>`, `<search>` becomes `< search>`, `<|im_end|>` becomes `< |im_end|>`, so that a web
    page or a program's output can neither end its block nor open a call, an answer or a turn, in either dialect. The
    parser knows no tag with a space in it, and inserting one never makes a new tag. All other text stays as it is.
    """
    return _ACTIVE.sub("< ", text)


def render_result(text: str, dialect: Dialect = "tags") -> str:
    """The block the environment appends after a call, its text escaped; chat marks around it are the caller's."""
    tag = "result" if dialect == "tags" else "tool_response"
    return f"<{tag}>\n{escape_result(text)}\n</{tag}>"


def render_call(call: ToolCall, dialect: Dialect = "tags") -> str:
    """A call as the model writes it; `parse_call` of it gives the call back."""
    if dialect == "tags":
        return f"<{call.name}>{call.arguments}</{call.name}>"
    body = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def _blocks(text: str, dialect: Dialect) -> list[Block]:
    """Cut a response into blocks and the text between them, back to back."""
    kinds = _KINDS[dialect]
    tags = list(_TAG[dialect].finditer(text))
    blocks: list[Block] = []
    at = i = 0
    while i < len(tags):
        if tags[i][1]:  # a closing tag that closes nothing stays in the text between blocks
            i += 1
            continue
        opening, name = tags[i], tags[i][2]
        body_end, end, i = _closing(tags, i, kinds, len(text))
        if at < opening.start():
            blocks.append(Block("text", "", at, opening.start(), text[at : opening.start()], None))
        body = text[opening.end() : body_end]
        error = UNCLOSED if body_end == end else None
        if error is None and kinds[name] != "tool_result" and (inner := _TAG[dialect].search(body)):
            error = f"nested {inner[0]} tag"
        blocks.append(Block(kinds[name], name, opening.start(), end, body, error))
        at = end
    if at < len(text):
        blocks.append(Block("text", "", at, len(text), text[at:], None))
    return blocks


def _closing(tags: list[re.Match], i: int, kinds: dict[str, SpanKind], length: int) -> tuple[int, int, int]:
    """Where the block opened by tags[i] ends: (end of body, end of block, index of the next tag to read).

    An unclosed block (body end == block end) runs to the end of the text, an unclosed call only to the result block
    that answered it. A lone <result> tag inside a call does not end it: that is a nested tag.
    """
    name, result_at = tags[i][2], None
    for j in range(i + 1, len(tags)):
        tag = tags[j]
        if tag[2] == name and tag[1]:
            return tag.start(), tag.end(), j + 1
        if kinds[name] == "tool_call" and kinds[tag[2]] == "tool_result":
            if not tag[1] and result_at is None:
                result_at = j
            elif tag[1] and result_at is not None:
                return tags[result_at].start(), tags[result_at].start(), result_at
    return length, length, len(tags)


def _read_tag_call(block: Block) -> ToolCall:
    arguments = _code(block.body) if block.name == "python" else block.body.strip()
    error = block.error or (None if arguments else "empty body")
    return ToolCall(block.name, arguments, ok=error is None, error=error)


def _read_hermes_call(block: Block) -> ToolCall:
    body = block.body.strip()
    if block.error == UNCLOSED or not body:
        return ToolCall("tool_call", body, ok=False, error=block.error or "empty body")
    try:
        call = _json_value(_unfenced(body))
    except ValueError as e:
        error = block.error or f"invalid JSON: {str(e)[:120]}"
        return ToolCall("tool_call", body, ok=False, error=error)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        return ToolCall("tool_call", body, ok=False, error='not an object with a "name"')
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):  # OpenAI's habit: the object once more as a string
        try:
            arguments = _json_value(arguments)
        except ValueError:
            pass
    if not isinstance(arguments, dict):
        return ToolCall(call["name"], body, ok=False, error="arguments are not an object")
    return ToolCall(call["name"], arguments)


def _json_value(text: str):
    """The value of JSON text or, where the intent is as clear, of a Python literal; ValueError if neither.

    What could not be written to a jsonl file again (inf, nan, lone surrogates, sets) is refused here.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as not_json:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's, on strange escapes in the model's text
                value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise not_json from None
    try:
        line = json.dumps(value, ensure_ascii=False, allow_nan=False)
        line.encode()
    except (TypeError, RecursionError) as e:
        raise ValueError(str(e)) from None
    return json.loads(line)


def _code(body: str) -> str:
    """Python source without a surrounding markdown fence, common indentation and blank ends."""
    body = _unfenced(body)
    if all(line[:1] in " \t" for line in body.split("\n") if line.strip()):
        body = textwrap.dedent(body)
    return body.strip()


def _unfenced(body: str) -> str:
    fenced = _FENCE.match(body)
    return fenced[1] if fenced else body


def _visible(text: str) -> bool:
    """Whether text between blocks is more than white space and chat marks."""
    return bool(_CHAT_MARK.sub("", text).strip())


def _misplaced(blocks: list[Block], dialect: Dialect) -> str:
    """Name what is out of place in a response whose blocks are fine one by one."""
    if dialect == "tags":
        for before, block in zip([None, *blocks], blocks):
            if block.kind == "text":
                where = f"after </{before.name}>" if before else "before the first tag"
                return f"text {where}: {block.body.strip()[:40]!r}"
        if blocks and blocks[-1].kind != "answer":
            return "no <answer> at the end"
    order = " ".join(block.name or "text" for block in blocks[:20])
    return f"blocks out of order: {order}" if order else "empty response"
