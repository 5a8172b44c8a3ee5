"""Trajectory: the one record that rollout, SFT, RL, flywheel and evaluation exchange, and its jsonl files.

Every per-token list has length T and one convention: index t describes token t (`old_logp[t]` is the log-probability of
token t given the tokens before it). Masks come from positions, set where
a token is created, and never from token identity. Imports nothing of this project.
"""

import gzip
import json
import math
import os
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

SpanKind = Literal["think", "tool_call", "tool_result", "answer", "text"]
Mode = Literal["think", "no_think"]
Finish = Literal["eos", "length", "tool_limit"]
Task = Literal["math", "qa", "function"]
Dialect = Literal["tags", "hermes"]


class DataError(ValueError):
    """Bad input data; the message names file, line and field. Scripts turn it into exit code 2."""


@dataclass
class Question:
    """One question. gold: a string, a list of aliases, or (task function) a list of admissible calls."""

    id: str
    question: str
    gold: Any
    task: Task
    tools: list[dict] | None = None  # declared functions (OpenAI-style schemas), hermes dialect
    system: str | None = None  # a system message that came with the row; replaces the rollout's own
    meta: dict = field(default_factory=dict)  # the row's other short fields: family, min_tool_calls, known, …
    told_by: str = field(default="", compare=False)  # what said which task it is


@dataclass
class Span:
    """Half-open token interval [start, end) of `Trajectory.token_ids`."""

    kind: SpanKind
    start: int
    end: int


@dataclass
class ToolCall:
    """What was parsed out of the model's text and what came back; a parse failure is kept with ok=False."""

    name: str
    arguments: str | dict
    result: str = ""
    ok: bool = True
    error: str | None = None
    seconds: float = 0.0


@dataclass
class Trajectory:
    """One sampled (or written) multi-turn response together with its prompt."""

    question_id: str  # group key: the id of the question's jsonl line, never the prompt text
    sample_idx: int  # 0..G-1 within the group
    mode: Mode  # no_think: the response opens with an empty think block
    token_ids: list[int]  # (T,) prompt + sampled + tool-result ids, exactly as fed to the model
    prompt_len: int  # P; the response is token_ids[P:]
    loss_mask: list[int]  # (T,) 1 = trained on (sampled, or demonstration text); 0 = prompt, tool result, hint
    sampled: bool  # every mask-1 token was sampled by a policy; RL refuses False
    response_text: str  # token_ids[P:] decoded once at creation; never tokenised back
    spans: list[Span]  # ordered, non-overlapping, inside [P, T)
    tool_calls: list[ToolCall]  # in order
    finish: Finish
    gold: Any  # the question's answer: str, list of aliases, or list of admissible calls (task function)
    question: str = ""
    task: Task = "qa"
    dialect: Dialect = "tags"  # how calls are written; task function is always hermes
    meta: dict = field(default_factory=dict)  # what the question's row adds: family, min_tool_calls, known, …
    old_logp: list[float] | None = None  # (T,) nats at the sampling temperature; 0.0 where loss_mask == 0
    entropy: list[float] | None = None  # (T,) nats, same convention
    rollout_logp: list[float] | None = None  # (T,) what the sampler computed, same convention (--check)
    ref_entropy: list[float] | None = None  # (T,) nats, of the frozen starting adapter (train_rl --indicator reference)
    rewards: dict[str, float] | None = None  # named terms; "total" is what is optimised
    advantage: list[float] | None = None  # (T,) 0.0 where loss_mask == 0

    def __post_init__(self):
        self.check()

    def check(self) -> None:
        """Raise ValueError naming the broken invariant."""
        for name, kind in KINDS.items():
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name} is {str(value)[:80]!r}, not of type {kind.__name__}")
        if not isinstance(self.meta.get("min_tool_calls"), (int, type(None))):
            raise ValueError(f"meta: min_tool_calls is {self.meta['min_tool_calls']!r}, not a number of calls")
        T = len(self.token_ids)
        if not 0 < self.prompt_len <= T:
            raise ValueError(f"prompt_len {self.prompt_len} is outside 1..{T}")
        for name in ("loss_mask", "old_logp", "entropy", "rollout_logp", "ref_entropy", "advantage"):
            values = getattr(self, name)
            if values is None:
                continue
            if len(values) != T:
                raise ValueError(f"{name} has {len(values)} entries for {T} tokens")
            if name != "loss_mask" and any(v != 0 and not m for v, m in zip(values, self.loss_mask)):
                raise ValueError(f"{name} is non-zero where loss_mask is 0")
        if not set(self.loss_mask) <= {0, 1}:
            raise ValueError("loss_mask holds values other than 0 and 1")
        if any(self.loss_mask[: self.prompt_len]):
            raise ValueError("loss_mask is 1 inside the prompt")
        at = self.prompt_len
        for span in self.spans:
            if not at <= span.start < span.end <= T:
                raise ValueError(f"span {span} is empty, overlaps another or leaves [{self.prompt_len}, {T})")
            at = span.end
            if span.kind not in get_args(SpanKind):
                raise ValueError(f"span kind {span.kind!r} is not one of {get_args(SpanKind)}")
            if span.kind == "tool_result" and any(self.loss_mask[span.start : span.end]):
                raise ValueError(f"loss_mask is 1 inside the tool result {span}")
        for name, allowed in (("mode", Mode), ("finish", Finish), ("task", Task), ("dialect", Dialect)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {get_args(allowed)}")

    @property
    def family(self) -> str:
        """What evaluations group by: the family that the question's row names, else its task."""
        return str(self.meta.get("family", self.task))

    @property
    def n_calls(self) -> int:
        """Closed tool calls, whatever came back (result, error, refusal); an unclosed call is not counted."""
        return sum(call.error != UNCLOSED for call in self.tool_calls)

    @property
    def failed_calls(self) -> int:
        """Calls whose tool (or parser) said that they failed."""
        return sum(not call.ok for call in self.tool_calls)

    @property
    def completion_tokens(self) -> int:
        """Model-written tokens (loss_mask 1), tool results excluded."""
        return sum(self.loss_mask)

    def to_json(self) -> str:
        """One jsonl line; `from_json` restores an equal object."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)

    @staticmethod
    def from_json(line: str) -> "Trajectory":
        """Inverse of `to_json`; ValueError names what is missing, unknown or broken."""
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ValueError("a trajectory is a JSON object")
        return Trajectory.from_row(row)

    @staticmethod
    def from_row(row: dict) -> "Trajectory":
        """The trajectory of a decoded line; ValueError as from `from_json`."""
        known = {f.name for f in fields(Trajectory)}
        if unknown := set(row) - known:
            raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
        for name in ("spans", "tool_calls"):
            if not isinstance(row.get(name, []), list):
                raise ValueError(f"{name} is {str(row[name])[:80]!r}, not of type list")
        try:
            spans = [Span(**span) for span in row["spans"]]
            tool_calls = [ToolCall(**call) for call in row["tool_calls"]]
            return Trajectory(**row | {"spans": spans, "tool_calls": tool_calls})
        except KeyError as e:
            raise ValueError(f"missing field {e}") from None
        except TypeError as e:
            raise ValueError(str(e).replace("Trajectory.__init__() ", "")) from None


KINDS = {  # fields whose type a file may get wrong
    "question_id": str, "sample_idx": int, "token_ids": list, "prompt_len": int, "loss_mask": list, "sampled": bool,
    "response_text": str, "spans": list, "tool_calls": list, "question": str, "meta": dict,
}  # fmt: skip
UNCLOSED = "unclosed"  # ToolCall.error of a call whose closing tag never came


def check_tokenizer(trajectories: Iterable[Trajectory], tokenizer: Any, where: str | Path) -> None:
    """DataError that names the first trajectory whose model-written ids a tokenizer reads as other text than its own.

    A model fed with another tokenizer's ids computes numbers that mean nothing. Spaces, undecodable bytes and Unicode
    forms do not count: a tokenizer may change them between a text and its ids.
    """
    for t in trajectories:
        runs = groupby(zip(t.token_ids, t.loss_mask), key=lambda pair: pair[1])
        pieces = [tokenizer.decode([i for i, _ in run]) for written, run in runs if written]
        rest, same, read = _letters(t.response_text), True, "".join(pieces)
        for piece in map(_letters, pieces):
            _, found, rest = rest.partition(piece) if piece else ("", "", rest)
            same = same and found == piece
        if not same or (pieces and t.response_text and not read):  # ids that it does not have are read as nothing
            raise DataError(
                f"{where}: trajectory {t.question_id}/{t.sample_idx} is of another tokenizer: this one reads its "
                f"model-written tokens as {read[:60]!r}, its text is {t.response_text[:60]!r}"
            )


def _letters(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).replace("\ufffd", "").split())


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number, object) of a jsonl file, blank lines skipped; DataError names file, line and field.

    A value that no jsonl file may hold (`unwritable`) is refused here: it would end the run when samples are written.
    """
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:  # ValueError: also a number of more than 4300 digits
            raise DataError(f"{path}:{number}: not valid JSON: {e}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        if problem := unwritable(row):
            raise DataError(f"{path}:{number}: {problem}")
        yield number, row


def unwritable(row: dict) -> str | None:
    """What keeps a row out of a jsonl file, with its field: NaN, infinity, half a surrogate pair. Else None."""
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False, default=str).encode()
        return None
    except (ValueError, RecursionError) as e:
        return next(_flaws(row, ""), str(e))


def _flaws(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flaws(key, f"{name}.{key}".lstrip("."))
            yield from _flaws(part, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from _flaws(part, f"{name}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"field {name!r} is {value}"
    elif isinstance(value, str) and writable(value) != value:
        yield f"field {name!r} holds half a surrogate pair: {value[:80]!a}"


def writable(text: str) -> str:
    """The text with "?" for every half of a surrogate pair, which JSON may hold and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode()


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> int:
    """Write rows as jsonl through a temporary file, so that a killed run leaves the old file; returns the count.

    ValueError for NaN and infinities, which `read_jsonl` refuses.
    """
    return _write_lines(path, (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows))


def save_trajectories(path: str | Path, trajectories: Iterable[Trajectory]) -> int:
    """Write a trajectory file (atomically); returns the number of lines."""
    return _write_lines(path, (t.to_json() for t in trajectories))


def load_trajectories(path: str | Path) -> list[Trajectory]:
    """Read and check a trajectory file; DataError names file, line and the broken field."""
    trajectories = []
    for number, row in read_jsonl(path):
        try:
            trajectories.append(Trajectory.from_row(row))
        except ValueError as e:
            raise DataError(f"{path}:{number}: {e}") from None
    return trajectories


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(number, line) of a text file, blank lines skipped, gzip if its name ends in .gz; DataError if it cannot be read.

    Lines end in LF or CRLF; a byte order mark is no text. Not str.splitlines, which also cuts at characters that JSON
    leaves as they are, such as U+2028.
    """
    try:
        with open_text(path) as lines:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    except UNREADABLE as e:
        raise DataError(unreadable(path, e)) from None


UNREADABLE = (OSError, UnicodeDecodeError, EOFError, zlib.error)


def open_text(path: str | Path, newline: str | None = None) -> TextIO:
    """A text file in UTF-8, open for reading; may raise, then and while it is read, what UNREADABLE lists."""
    opened = gzip.open if str(path).endswith(".gz") else open
    return opened(path, "rt", encoding="utf-8-sig", newline=newline)


def unreadable(path: str | Path, e: Exception) -> str:
    """One line on a file that could not be read."""
    if isinstance(e, (FileNotFoundError, IsADirectoryError)):
        return f"{path}: no such file"
    if isinstance(e, UnicodeDecodeError):
        return f"{path}: not UTF-8 text: {e}"
    return f"{path}: cannot be read: {e}"


def groups_of(trajectories: Iterable[Trajectory]) -> list[list[Trajectory]]:
    """Group by question_id, in order of first appearance; inside a group by sample_idx."""
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.question_id, []).append(trajectory)
    return [sorted(group, key=lambda t: t.sample_idx) for group in groups.values()]


def _write_lines(path: str | Path, lines: Iterable[str]) -> int:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    count = 0
    with open(temporary, "w", encoding="utf-8") as out:
        for line in lines:
            out.write(line + "\n")
            count += 1
    os.replace(temporary, path)
    return count
