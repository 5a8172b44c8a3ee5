"""Did a tool call lower the model's entropy? Cuts a trajectory at its calls and compares the parts [2602.02050; C1].

Pure functions of a trajectory's spans, masks and stored per-token entropies (nats). A *turn* is what stands between two
tool results; several calls in one turn count as one call here. With n calls there are n + 1 segments r_0 … r_n.
"""

from itertools import pairwise
from math import nan
from statistics import fmean
from typing import Literal, NamedTuple

from core.trajectory import UNCLOSED, Trajectory

Segment = Literal["reasoning", "reasoning_with_answer", "with_call", "think"]


class Turn(NamedTuple):
    """Tokens [start, end) between two tool results; those from `call` on belong to its calls (None: it opens none)."""

    start: int
    end: int
    call: int | None
    closed: bool  # it ends in a call; False for a last turn that opens none, or only one that is never closed


def turns_of(t: Trajectory) -> list[Turn]:
    """The turns of a trajectory, one more than its tool results. ValueError for calls without any spans."""
    if t.tool_calls and not t.spans:
        raise ValueError(f"trajectory {t.question_id}/{t.sample_idx} has {len(t.tool_calls)} calls but no spans")
    turns, at = [], t.prompt_len
    for start, end in [*((s.start, s.end) for s in t.spans if s.kind == "tool_result"), (len(t.token_ids), None)]:
        calls = [s.start for s in t.spans if s.kind == "tool_call" and at <= s.start < start]
        unclosed = bool(t.tool_calls) and t.tool_calls[-1].error == UNCLOSED  # always the last call there is
        turns.append(Turn(at, start, min(calls, default=None), end is not None or len(calls) > unclosed))
        at = end
    return turns


def call_turns(t: Trajectory) -> list[Turn]:
    """The turns that end in a closed call: one per call k."""
    return [turn for turn in turns_of(t) if turn.closed]


def calls_by_turn(t: Trajectory) -> list[slice]:
    """Where in `tool_calls` the calls of each of `call_turns` stand."""
    slices, at = [], 0
    for turn in call_turns(t):
        n = max(sum(s.kind == "tool_call" and turn.start <= s.start < turn.end for s in t.spans), 1)
        slices.append(slice(at, at + n))
        at += n
    return slices


def segment_entropies(t: Trajectory, segment: Segment = "reasoning", entropy: list[float] | None = None) -> list[float]:
    """H(r_0) … H(r_n): mean token entropy of each segment, model-written tokens only; nan where it has none.

    reasoning: up to the first call of the turn, in the last turn up to its answer, so that all segments hold the same
    kind of text; a last turn that never came to an answer counts whole · reasoning_with_answer: the last segment runs
    to the end of its turn, answer included, which alone lowers its mean (what `reasoning` meant in older runs) ·
    with_call: the whole turn, call and answer included · think: its think blocks before the call, tags included.
    The answer is the <answer> block; in hermes, which has none, what follows the last turn's thoughts.
    entropy: (T,) nats, by default the stored ones. A call that nothing follows (over the limit, or the answer of task
    function) is followed by nan. ValueError if there are no entropies.
    """
    entropy = t.entropy if entropy is None else entropy
    if entropy is None:
        raise ValueError(f"trajectory {t.question_id}/{t.sample_idx} has no token entropies")
    turns, means = turns_of(t), []
    for turn in turns:
        end = turn.end if turn.call is None or segment == "with_call" else turn.call
        if segment == "reasoning" and turn.call is None:
            end = _answer_start(t, turn)
        at = range(turn.start, end)
        if segment == "think":
            blocks = [s for s in t.spans if s.kind == "think" and turn.start <= s.start < end]
            at = [i for s in blocks for i in range(s.start, min(s.end, end))]
        written = [entropy[i] for i in at if t.loss_mask[i]]
        means.append(fmean(written) if written else nan)
    return [*means, nan] if turns[-1].closed else means


def _answer_start(t: Trajectory, turn: Turn) -> int:
    """Token at which the answer of a turn without a call begins; the turn's end if it has none."""
    mine = [s for s in t.spans if turn.start <= s.start < turn.end]
    if t.dialect == "hermes":
        return max((s.end for s in mine if s.kind == "think"), default=turn.start)
    return min((s.start for s in mine if s.kind == "answer"), default=turn.end)


def entropy_changes(entropies: list[float]) -> list[float]:
    """ΔH_k = H(r_k) − H(r_{k−1}) of each call; nan where a segment is empty."""
    return [after - before for before, after in pairwise(entropies)]


def reducing(entropies: list[float], margin: float = 0.0) -> list[bool]:
    """I_k = 1[ΔH_k < −margin] of each call; False where a segment is empty. ValueError without any segment."""
    if not entropies:
        raise ValueError("n calls have n + 1 segment entropies, got none at all")
    return [change < -margin for change in entropy_changes(entropies)]


def mean_entropy(t: Trajectory) -> float:
    """H_i: mean entropy of all model-written tokens, the mode decision included; nan if there are none [PAPERS B4]."""
    if t.entropy is None:
        raise ValueError(f"trajectory {t.question_id}/{t.sample_idx} has no token entropies")
    return sum(t.entropy) / t.completion_tokens if t.completion_tokens else nan
