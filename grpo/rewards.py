"""Reward formulas of the papers as pure numbers, and the table that train_rl.py picks from.

A formula takes plain numbers (of one trajectory, or lists over its group) and knows nothing of tokens or models.
An adapter in `REWARDS` reads those lists from trajectories. A new reward is one function and one line in `REWARDS`.
Every reward is a dict of named terms; "total" is what is optimised, all are logged.
"""

import math
import random
from statistics import fmean, pstdev
from typing import Any, Literal

from core.segments import calls_by_turn, reducing, segment_entropies
from core.trajectory import Trajectory
from eval.behaviour import CORRECT, call_labels

Indicator = Literal["entropy", "reference", "oracle", "random"]


def et_agent(
    correctness: list[float],
    tool_calls: list[int],
    reasoning_lengths: list[float],
    well_formed: list[bool],
    sigma_tool: float,
    sigma_length: float,
    behaviour_gain: float = 1.0,
) -> list[dict[str, float]]:
    """R_i = S_i · f_tool,i · f_length,i + R_format,i for one group [2601.06860, sec. 4.2.3].

    f_tool = g / (1 + exp(σ_tool (n_i − mean n))), f_length = g / (1 + exp(σ_length z_i)) with z_i the z-score of the
    reasoning length (tokens, population std; 0 for the whole group if the std is 0); R_format = −1 if malformed.
    g = `behaviour_gain` is 1 in the paper and 2 in its code. ValueError if the lists differ in length or are empty.
    """
    if not correctness or len({len(correctness), len(tool_calls), len(reasoning_lengths), len(well_formed)}) > 1:
        raise ValueError("et_agent needs four non-empty lists of equal length")
    mean_calls, mean_length, std_length = fmean(tool_calls), fmean(reasoning_lengths), pstdev(reasoning_lengths)
    rewards = []
    for correct, calls, length, formed in zip(correctness, tool_calls, reasoning_lengths, well_formed):
        z = (length - mean_length) / std_length if std_length > 0 else 0.0
        f_tool = behaviour_gain * _falling_sigmoid(sigma_tool * (calls - mean_calls))
        f_length = behaviour_gain * _falling_sigmoid(sigma_length * z)
        malformed = 0.0 if formed else -1.0
        rewards.append(
            {
                "total": correct * f_tool * f_length + malformed,
                "correct": float(correct),
                "f_tool": f_tool,
                "f_length": f_length,
                "format": malformed,
            }
        )
    return rewards


def _falling_sigmoid(x: float) -> float:
    """1 / (1 + e^x) without overflow."""
    return 1 / (1 + math.exp(x)) if x < 0 else math.exp(-x) / (1 + math.exp(-x))


def autotool(correct: bool, think: bool, well_formed: bool) -> float:
    """Asymmetric reward [2603.13348; PAPERS B3]: right +1 without and +0.5 with thinking, wrong −1 and −0.5.

    −1 for a malformed response, whatever it answers. With p the probability of a right answer, not thinking is worth
    2 p_no − 1 and thinking p_think − 1/2: not thinking pays where p_no > (p_think + 0.5) / 2, that is above .75 where
    thinking is always right. So the reward's optimum is less accurate than always thinking.
    """
    if not well_formed:
        return -1.0
    return (0.5 if think else 1.0) * (1 if correct else -1)


def otc(correctness: list[float], tool_calls: list[int], right: list[bool], limit: int) -> list[dict[str, float]]:
    """R_i = S_i · r_tool,i of one group: OTC-PO's reward in its form for GRPO [2504.14870; PAPERS D].

    m calls; n = the fewest calls of a right sample of the group, which stands for the question's optimal number; c =
    `limit`, the most calls there may be. r_tool = 1 if m = n = 0; cos(π m / (2m + c)) if n = 0 < m; else
    sin(π f / (2n)) with f = 2nm / (m + n), which is 1 at m = n and falls on both sides. Without a right sample there is
    no n, and r_tool = 1 (our reading). The formula is from notes and re-implementations that agree with each other; the
    paper itself was not read. Left out: the smallest n of earlier epochs, and a factor α in front.
    """
    fewest = min((m for m, ok in zip(tool_calls, right) if ok), default=None)
    factors = [1.0 if fewest is None else _otc_factor(m, fewest, limit) for m in tool_calls]
    return [{"total": s * f, "correct": float(s), "f_tool": f} for s, f in zip(correctness, factors)]


def _otc_factor(m: int, n: int, c: int) -> float:
    if m == n:
        return 1.0
    return math.cos(math.pi * m / (2 * m + c)) if n == 0 else math.sin(math.pi * m / (m + n))


def entropy_sparse(correctness: float, segment_entropies: list[float], margin: float = 0.0) -> float:
    """R = S · m / n: n calls, m of them with I_k = 1; R = S without calls [2602.02050; PAPERS C2].

    segment_entropies: n + 1 values in nats; the call before or after an empty segment (nan) counts as not reducing.
    """
    return sparse(correctness, reducing(segment_entropies, margin))


def entropy_dense(
    correctness: float, segment_entropies: list[float], alpha: float = 0.5, margin: float = 0.0
) -> list[float]:
    """r_k = S · (1 + α · I_k) of each call; [] without calls [2602.02050; PAPERS C3]. Arguments: `entropy_sparse`."""
    return dense(correctness, reducing(segment_entropies, margin), alpha)


def sparse(correctness: float, indicators: list[bool]) -> float:
    """`entropy_sparse` from the indicators I_k themselves."""
    return correctness * fmean(indicators) if indicators else correctness


def dense(correctness: float, indicators: list[bool], alpha: float) -> list[float]:
    """`entropy_dense` from the indicators I_k themselves."""
    return [correctness * (1 + alpha * reduces) for reduces in indicators]


def call_indicators(group: list[Trajectory], a: Any) -> list[list[bool]]:
    """I_k of every call of every trajectory of a group, by `--indicator`; several calls in one turn count as one.

    entropy: from the policy's entropies · reference: from those of the frozen starting adapter on the same tokens ·
    oracle: whether the call is needed (exact in the world) · random: the group's own I_k, dealt out anew among its
    calls, so that their rate stays.
    """
    if a.indicator == "oracle":
        return [_needed(t) for t in group]
    found = [
        reducing(
            segment_entropies(t, a.segment, t.ref_entropy if a.indicator == "reference" else t.entropy),
            a.delta_margin,
        )
        for t in group
    ]
    if a.indicator != "random":
        return found
    dealt = [i for row in found for i in row]
    random.Random(repr([t.token_ids for t in group])).shuffle(dealt)  # a function of the samples: resume needs no state
    return [[dealt.pop() for _ in row] for row in found]


def _needed(t: Trajectory) -> list[bool]:
    labels = call_labels(t)
    return ["needed" in labels[calls] for calls in calls_by_turn(t)]


# ---------------------------------------------------------------------------------------------------- adapters


def correct_reward(group: list[Trajectory], correctness: list[float], formed: list[bool], a: Any) -> list[dict]:
    """Outcome only: the correctness S_i, 0 if malformed as in the entropy rewards; nothing for behaviour.

    ET-Agent's reward without its behaviour terms is `et_agent` with both σ at 0: the same weight of the format term.
    """
    return [{"total": float(s * ok), "correct": float(s)} for s, ok in zip(correctness, formed)]


def et_agent_reward(group: list[Trajectory], correctness: list[float], formed: list[bool], a: Any) -> list[dict]:
    """Adapter: n_i = closed calls, length = model-written tokens (tool results excluded)."""
    return et_agent(
        correctness,
        [t.n_calls for t in group],
        [t.completion_tokens for t in group],
        formed,
        a.sigma_tool,
        a.sigma_length,
        a.behaviour_gain,
    )


def autotool_reward(group: list[Trajectory], correctness: list[float], formed: list[bool], a: Any) -> list[dict]:
    """Adapter: correct above S = 0.8 (QA F1), thinking unless the response opens with an empty block or none."""
    return [
        {"total": autotool(s > CORRECT, t.mode == "think", ok), "correct": s, "format": 0.0 if ok else -1.0}
        for t, s, ok in zip(group, correctness, formed)
    ]


def entropy_sparse_reward(group: list[Trajectory], correctness: list[float], formed: list[bool], a: Any) -> list[dict]:
    """Adapter: a malformed response scores S = 0; `reducing` = share of calls with I_k = 1, absent without calls."""
    rows = correct_reward(group, correctness, formed, a)
    return [
        row | {"total": sparse(row["total"], found)} | _share(found)
        for row, found in zip(rows, call_indicators(group, a))
    ]


def entropy_dense_reward(group: list[Trajectory], correctness: list[float], formed: list[bool], a: Any) -> list[dict]:
    """Adapter: total = mean of the calls' rewards (S without calls), for the log; `--advantage entropy_dense` takes
    `outcome` (S, 0 if malformed) and each call's own reward."""
    rows = [row | {"outcome": row["total"]} for row in correct_reward(group, correctness, formed, a)]
    return [
        row | {"total": fmean(dense(row["outcome"], found, a.dense_alpha) or [row["outcome"]])} | _share(found)
        for row, found in zip(rows, call_indicators(group, a))
    ]


def _share(indicators: list[bool]) -> dict[str, float]:
    return {"reducing": fmean(indicators)} if indicators else {}


def calls_penalty_reward(group: list[Trajectory], correctness: list[float], formed: list[bool], a: Any) -> list[dict]:
    """Control of the sparse reward: S − λ n, S = 0 if malformed, n = closed calls."""
    rows = correct_reward(group, correctness, formed, a)
    return [row | {"total": row["total"] - a.call_penalty * t.n_calls} for row, t in zip(rows, group)]


def otc_reward(group: list[Trajectory], correctness: list[float], formed: list[bool], a: Any) -> list[dict]:
    """Adapter: S = 0 if malformed, right above S = 0.8, m = closed calls, c = `--max_tool_calling_iterations`."""
    scores = [row["total"] for row in correct_reward(group, correctness, formed, a)]
    rows = otc(scores, [t.n_calls for t in group], [s > CORRECT for s in scores], a.max_tool_calling_iterations)
    return [row | {"correct": float(s)} for row, s in zip(rows, correctness)]


def length_penalty_reward(group: list[Trajectory], correctness: list[float], formed: list[bool], a: Any) -> list[dict]:
    """Control of AutoTool: its asymmetric reward − c · |o| / L_max, |o| = model-written tokens (c = 0.5)."""
    rows = autotool_reward(group, correctness, formed, a)
    penalties = [a.length_penalty * t.completion_tokens / a.max_completion_length for t in group]
    return [row | {"total": row["total"] - penalty} for row, penalty in zip(rows, penalties)]


# name -> (group, correctness, well_formed, args) -> one dict of terms per trajectory
REWARDS = {
    "correct": correct_reward,
    "et_agent": et_agent_reward,
    "autotool": autotool_reward,
    "entropy_sparse": entropy_sparse_reward,
    "entropy_dense": entropy_dense_reward,
    "calls_penalty": calls_penalty_reward,
    "otc": otc_reward,
    "length_penalty": length_penalty_reward,
}
