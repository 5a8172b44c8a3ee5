"""Is a trajectory's answer right (S, 0 to 1), and is its response well formed? The same for rewards and evaluation."""

from typing import Literal

from core.parse import parse_calls, well_formed
from core.trajectory import Trajectory
from eval.bfcl import calls_match
from eval.metrics import extract_answer, f1, math_equal


def correctness(trajectory: Trajectory) -> float:
    """S in [0, 1] of what was answered: math equivalence 0/1, QA F1 over the aliases, function calls 0/1 [PAPERS A].

    Judges the answer alone: that a truncated or malformed trajectory scores 0 is the rule of the callers.
    """
    if trajectory.task == "function":
        calls = parse_calls(trajectory.response_text, "hermes")
        return float(calls_match(calls, trajectory.gold, trajectory.meta.get("tools")))
    answer = extract_answer(trajectory.response_text)
    if trajectory.task == "math":
        return float(math_equal(answer, trajectory.gold))
    return f1(answer, trajectory.gold)


def grade(trajectory: Trajectory, format: Literal["lenient", "strict"] = "lenient") -> tuple[float, bool]:
    """(S, well formed) as rewards, flywheel and evaluation use them [PAPERS, details fixed for all three].

    format: what counts as well formed (core.parse.format_error). A trajectory that ran out of tokens or calls scores 0
    and is malformed, whatever it answered.
    """
    if trajectory.finish != "eos":
        return 0.0, False
    formed = well_formed(trajectory.response_text, trajectory.dialect, trajectory.task, strict=format == "strict")
    return correctness(trajectory), formed
