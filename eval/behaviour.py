"""Behaviour errors of ET-Agent found without a judge: redundant, failed and insufficient calls, void turns.

Exact in the calibration world, where a question says how many calls it needs (`meta["min_tool_calls"]`); elsewhere by
what can be read off the text: repeated calls, and results of which nothing is used later. Functions take trajectories
and the correctness of each; `python -m eval.evaluate` prints their rates.
"""

import json
import re
from collections import Counter
from statistics import fmean

from core.parse import parse_calls, spans_of
from core.trajectory import UNCLOSED, ToolCall, Trajectory
from data.world.passages import fact_of, fits
from eval.metrics import normalise_answer

CORRECT = 0.8  # a trajectory is correct above this (QA F1 as in the released flywheel; math and functions are 0 or 1)
TAG = re.compile(r"<[/|]?\w+\|?>")  # <think>, </answer>, <|im_end|>
TOKEN = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?|[^\W\d_]+")
# Words that say nothing about whether a result was used.
COMMON = frozenset(
    "a an and are as at be but by for from had has have he her his i in is it its no not of on or she so that the "
    "their then there they this to was we were which who will with you".split()
)

# ---- one trajectory --------------------------------------------------------------------------------------------------


def executed_calls(trajectory: Trajectory) -> int:
    """Calls that ran; a refused, failed or malformed call gives no information, so its retry is not redundant."""
    return sum(call.ok for call in trajectory.tool_calls)


def duplicate_calls(trajectory: Trajectory) -> list[int]:
    """Indices of calls with the tool and the normalised arguments of an earlier call that ran."""
    seen, repeated = set(), []
    for i, call in enumerate(trajectory.tool_calls):
        if (key := _call_key(call)) in seen:
            repeated.append(i)
        if call.ok:
            seen.add(key)
    return repeated


def unused_calls(trajectory: Trajectory) -> list[int]:
    """Indices of calls that ran and whose result added nothing that the model wrote later.

    Added = words and numbers that are neither common, nor in the question, nor in anything before the result.
    """
    turns, results = split_turns(trajectory)
    words = [_words(turn) for turn in turns]
    seen, unused = _words(trajectory.question) | COMMON, []
    closed = [i for i, call in enumerate(trajectory.tool_calls) if call.error != UNCLOSED]
    for k, (i, result) in enumerate(zip(closed, results)):
        seen |= words[k]
        added = _words(result) - seen
        if trajectory.tool_calls[i].ok and not added & set().union(*words[k + 1 :]):
            unused.append(i)
        seen |= added
    return unused


def needed_calls(trajectory: Trajectory) -> int | None:
    """Calls that this trajectory needed (world; else None): `min_tool_calls`, which says what is needed if every search
    finds its passage, and each reworded search after a passage that did not fit (data/world/noise.py)."""
    need = trajectory.meta.get("min_tool_calls")
    return need and need + len(_rewordings(trajectory)[0])


def _rewordings(trajectory: Trajectory) -> tuple[list[int], bool]:
    """(indices of searches that reword one whose passage did not fit, whether a fact was left without one that fits).

    Wordings differ as the noisy index tells them apart, so "the" in front is one, though not for duplicate_calls.
    """
    asked: dict[frozenset, set[str]] = {}  # fact -> wordings so far; none once a passage fits
    reworded = []
    for i, call in enumerate(trajectory.tool_calls):
        if call.name != "search" or not call.ok or not isinstance(call.arguments, str):
            continue
        query, fitting = " ".join(call.arguments.lower().split()), fits(call.arguments, call.result)
        wordings = asked.setdefault(fact_of(query), set())
        if wordings and query not in wordings:
            reworded.append(i)
        if fitting:
            wordings.clear()
        elif fitting is False:
            wordings.add(query)
    return reworded, any(asked.values())


def redundant_calls(trajectory: Trajectory) -> int:
    """Number of redundant calls: executed calls beyond the need, or repeats (world); else repeated or unused calls."""
    repeated, need = duplicate_calls(trajectory), needed_calls(trajectory)
    if need is not None:
        repeated = set(repeated).difference(_rewordings(trajectory)[0] if need else ())
        return max(executed_calls(trajectory) - need, len(repeated))
    return len({*repeated, *unused_calls(trajectory)})


def call_labels(trajectory: Trajectory) -> list[str]:
    """What each call was worth: needed | redundant | repeated | failed.

    failed: the tool said so · repeated: as `duplicate_calls`, rewordings that are needed excepted · redundant: executed
    beyond `needed_calls` (world), else a result of which nothing is used · needed: the rest.
    """
    need, executed = needed_calls(trajectory), 0
    unused = unused_calls(trajectory) if need is None else ()
    reworded = _rewordings(trajectory)[0] if need else ()
    repeated = set(duplicate_calls(trajectory)).difference(reworded)
    labels = []
    for i, call in enumerate(trajectory.tool_calls):
        if not call.ok:
            labels.append("failed")
        elif i in repeated:
            labels.append("repeated")
        else:
            beyond = i in unused if need is None else executed >= need
            labels.append("redundant" if beyond else "needed")
            executed += 1
    return labels


def insufficient(trajectory: Trajectory, correctness: float, group: list[tuple[Trajectory, float]] = ()) -> bool:
    """Wrong after fewer executed calls than needed, or without a passage that fits a search of it (world); elsewhere
    after fewer executed calls than some correct trajectory of its group.

    group: (trajectory, correctness) pairs of the same question; not read in the world.
    """
    if correctness > CORRECT:
        return False
    need = needed_calls(trajectory)
    if need:
        return executed_calls(trajectory) < need or _rewordings(trajectory)[1]
    if need is None:
        need = max((executed_calls(other) for other, c in group if c > CORRECT), default=0)
    return executed_calls(trajectory) < need


def void_turns(trajectory: Trajectory) -> int:
    """Number of model turns that hold neither a call nor an answer; with task function plain text is an answer."""
    turns, _ = split_turns(trajectory)
    last = len(turns) - 1
    # Nothing between the results of parallel calls is no turn; nothing at the end is one if the model chose to stop.
    stopped = trajectory.finish == "eos"
    written = [turn for i, turn in enumerate(turns) if turn.strip() or i == 0 or (i == last and stopped)]
    return sum(_is_void(turn, trajectory) for turn in written)


def _is_void(turn: str, trajectory: Trajectory) -> bool:
    if parse_calls(turn, trajectory.dialect):
        return False
    if trajectory.task == "function":
        return not TAG.sub("", re.sub(r"<think>.*?(</think>|$)", "", turn, flags=re.DOTALL)).strip()
    return "</answer>" not in turn and "\\boxed" not in turn


def split_turns(trajectory: Trajectory) -> tuple[list[str], list[str]]:
    """What the model wrote between tool results, and the results: turn k ends where result k begins.

    There is always one turn more than results; turns between the results of parallel calls are empty.
    """
    text, at, turns, results = trajectory.response_text, 0, [], []
    for kind, start, end in spans_of(text, trajectory.dialect):
        if kind == "tool_result":
            turns.append(text[at:start])
            results.append(text[start:end])
            at = end
    return [*turns, text[at:]], results


def _call_key(call: ToolCall) -> tuple[str, str]:
    clean = normalise_answer if call.name == "search" else lambda text: " ".join(text.split())
    arguments = call.arguments if isinstance(call.arguments, dict) else {"": call.arguments}
    cleaned = {k: clean(v) if isinstance(v, str) else v for k, v in arguments.items()}
    return call.name, json.dumps(cleaned, sort_keys=True)


def _words(text: str) -> set[str]:
    """Lower-case words and numbers; 1,200.0 and 1200 are the same number."""
    found = TOKEN.findall(TAG.sub(" ", text.lower()))
    return {f"{float(w.replace(',', '')):.10g}" if w[0].isdigit() else w for w in found}


# ---- many trajectories -----------------------------------------------------------------------------------------------


def rates(trajectories: list[Trajectory], correctness: list[float]) -> dict[str, float | None]:
    """Behaviour of a set of trajectories, correctness aligned with it.

    redundant, duplicate, unused, insufficient, void: shares of trajectories with at least one; failed, redundant_calls:
    shares of calls (0 if there are none); an unclosed call is counted as failed here and as a call. insufficient is None
    where nothing tells how many calls are needed: outside the world with one trajectory per question.
    """
    group = {}
    for t, c in zip(trajectories, correctness, strict=True):
        group.setdefault(t.question_id, []).append((t, c))
    calls = sum(len(t.tool_calls) for t in trajectories)
    pairs = zip(trajectories, correctness)
    known = [(t, c) for t, c in pairs if needed_calls(t) is not None or len(group[t.question_id]) > 1]
    return {
        "redundant": fmean(redundant_calls(t) > 0 for t in trajectories),
        "redundant_calls": sum(map(redundant_calls, trajectories)) / max(calls, 1),
        "insufficient": fmean(insufficient(t, c, group[t.question_id]) for t, c in known) if known else None,
        "failed": sum(t.failed_calls for t in trajectories) / max(calls, 1),
        "duplicate": fmean(bool(duplicate_calls(t)) for t in trajectories),
        "unused": fmean(bool(unused_calls(t)) for t in trajectories),
        "void": fmean(void_turns(t) > 0 for t in trajectories),
    }


def failure_histogram(trajectories: list[Trajectory]) -> dict[int, int]:
    """Number of trajectories by their number of failed calls [2601.06860, sec. 3]."""
    return dict(sorted(Counter(t.failed_calls for t in trajectories).items()))


def call_spread(trajectories: list[Trajectory], correctness: list[float]) -> dict[int, int]:
    """Number of questions by max − min calls among their correct trajectories, two at least [2601.06860, sec. 3]."""
    calls: dict[str, list[int]] = {}
    for t, c in zip(trajectories, correctness, strict=True):
        if c > CORRECT:
            calls.setdefault(t.question_id, []).append(t.n_calls)
    return dict(sorted(Counter(max(n) - min(n) for n in calls.values() if len(n) > 1).items()))
