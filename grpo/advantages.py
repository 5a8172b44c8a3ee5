"""Advantages and token weights of GRPO: what multiplies each token's terms in the loss.

Symbols: G trajectories per question · B trajectories per optimizer step · |o_i| tokens of trajectory i with
loss_mask 1 · A advantage · w token weight · L_max the completion limit. The clipped surrogate itself, with its KL and
entropy terms, is `kernels.linear_policy_loss`; a step's loss is Σ_t w_t · loss_t, so the weights of one optimizer step
are fixed here once, over all its micro-batches.
"""

from statistics import fmean, stdev
from typing import Any, Literal

from core.segments import turns_of
from core.trajectory import Trajectory
from grpo.rewards import call_indicators, dense

LossType = Literal["grpo", "dapo", "dr_grpo"]
MIN_STD = 1e-6  # a group whose rewards vary less carries no signal


def group_advantages(totals: list[float], divide_by_std: bool = True) -> list[float]:
    """A_i = (R_i − mean) / (std + 1e-6) with the sample std [2601.06860, eq. 4; 2402.03300]; all 0 if std < 1e-6.

    divide_by_std False leaves the division out (Dr. GRPO, 2503.20783).
    """
    spread = stdev(totals) if len(totals) > 1 else 0.0
    if spread < MIN_STD:
        return [0.0] * len(totals)
    mean = fmean(totals)
    return [(r - mean) / (spread + MIN_STD if divide_by_std else 1.0) for r in totals]


def grpo(group: list[Trajectory], rewards: list[dict[str, float]], a: Any) -> list[list[float]]:
    """The group-normalised total reward, broadcast to the trajectory's model-written tokens: (T,) each."""
    return _broadcast(group, group_advantages([r["total"] for r in rewards]))


def grpo_no_std(group: list[Trajectory], rewards: list[dict[str, float]], a: Any) -> list[list[float]]:
    """As `grpo` without the division by the group's std, which cancels a common factor of the reward."""
    return _broadcast(group, group_advantages([r["total"] for r in rewards], divide_by_std=False))


def _broadcast(group: list[Trajectory], advantages: list[float]) -> list[list[float]]:
    return [[adv * m for m in t.loss_mask] for t, adv in zip(group, advantages)]


def entropy_dense(group: list[Trajectory], rewards: list[dict[str, float]], a: Any) -> list[list[float]]:
    """Tool-level advantages [2602.02050; PAPERS C3]: r_k = S (1 + α I_k) normalised over all calls of the group.

    Call k's advantage goes to its turn: the reasoning before it and its own tokens. The final segment, and all of a
    trajectory without calls, gets the group-normalised outcome, S = rewards["outcome"].
    """
    outcomes = group_advantages([r["outcome"] for r in rewards])
    indicators = call_indicators(group, a)
    per_call = [dense(r["outcome"], found, a.dense_alpha) for r, found in zip(rewards, indicators)]
    normalised = iter(group_advantages([r for row in per_call for r in row]))
    rows = _broadcast(group, outcomes)
    for row, t in zip(rows, group):
        for turn in turns_of(t):
            if turn.closed:
                value = next(normalised)
                row[turn.start : turn.end] = [value * m for m in t.loss_mask[turn.start : turn.end]]
    return rows


# name -> (group, rewards, args) -> one (T,) list per trajectory, 0.0 where loss_mask is 0
ADVANTAGES = {
    "grpo": grpo,
    "grpo_no_std": grpo_no_std,
    "entropy_dense": entropy_dense,
}


def token_weights(lengths: list[int], loss_type: LossType, max_completion_length: int) -> list[float]:
    """The weight w of every token of each trajectory in one optimizer step; lengths = |o_i|, 0 for a masked row.

    grpo: 1/(B·|o_i|), mean over trajectories of token means · dapo: 1/Σ|o_i|, token mean over the step ·
    dr_grpo: 1/(B·L_max), constant.
    """
    B = len(lengths)
    if loss_type == "grpo":
        return [1 / (B * n) if n else 0.0 for n in lengths]
    if loss_type == "dapo":
        return [1 / max(sum(lengths), 1) if n else 0.0 for n in lengths]
    if loss_type == "dr_grpo":
        return [1 / (B * max_completion_length) if n else 0.0 for n in lengths]
    raise ValueError(f"unknown loss_type {loss_type!r}")
