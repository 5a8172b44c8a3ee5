"""Advantages, token weights and entropy coefficients of GRPO: what multiplies each token's terms in the loss.

Symbols: G trajectories per question · B trajectories per optimizer step · |o_i| tokens of trajectory i with
loss_mask 1 · A advantage · w token weight · L_max the completion limit · H_i mean token entropy of trajectory i in
nats · β_i its entropy coefficient · m_i = 1 without thinking. The clipped surrogate itself, with its KL and
entropy terms, is `kernels.linear_policy_loss`; a step's loss is Σ_t w_t · loss_t, so the weights of one optimizer
step are fixed here once, over all its micro-batches.
"""

from dataclasses import dataclass, replace
from math import isnan, nan
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from torch import Tensor

from core.segments import mean_entropy, turns_of
from core.trajectory import Trajectory
from grpo.rewards import call_indicators, dense

AdvantageName = Literal["grpo", "grpo_no_std", "entropy_dense"]
RegulariserName = Literal["none", "constant", "adaptive", "decoupled"]
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


# ---------------------------------------------------------------------------------------------------- entropy


@dataclass(frozen=True)
class EntropyState:
    """β_s, β_l and the targets H_s, H_l in nats of AutoTool's entropy constraint; a target of nan is not set yet."""

    beta_short: float = 0.0
    beta_long: float = 1e-2
    target_short: float = 0.1
    target_long: float = 0.2


def entropy_coefficients(entropy: Tensor, no_think: Tensor, state: EntropyState) -> Tensor:
    """β_i = β_s m_i 1[H_i ≤ H_s] + β_l (1 − m_i) 1[H_i ≤ H_l], (B,), no gradient [2603.13348; PAPERS B4].

    entropy: (B,) H_i of the old policy in nats · no_think: (B,) bool m_i. nan (no tokens, no target yet) gives 0.
    """
    entropy, no_think = torch.as_tensor(entropy).detach(), torch.as_tensor(no_think)
    short = state.beta_short * (entropy <= state.target_short).to(entropy.dtype)
    long = state.beta_long * (entropy <= state.target_long).to(entropy.dtype)
    return torch.where(no_think, short, long)


def update_beta_long(state: EntropyState, entropy: Tensor, no_think: Tensor, lr: float) -> EntropyState:
    """One SGD step on L_β = mean over think trajectories of β_l (H_i − H_l), clamped to [0, 1] [PAPERS B4].

    β_l rises while the entropy is below its target. Unchanged without think trajectories or without a target.
    """
    entropy, no_think = torch.as_tensor(entropy), torch.as_tensor(no_think)
    thought = entropy[~no_think & ~entropy.isnan()].double()
    if not len(thought) or isnan(state.target_long):
        return state
    return replace(state, beta_long=min(max(state.beta_long - lr * (thought.mean().item() - state.target_long), 0), 1))


def no_bonus(entropy: Tensor, no_think: Tensor, state: EntropyState, a: Any) -> Tensor:
    """No entropy term."""
    return torch.zeros_like(entropy)


def constant(entropy: Tensor, no_think: Tensor, state: EntropyState, a: Any) -> Tensor:
    """`--entropy_coef` for every trajectory."""
    return torch.full_like(entropy, a.entropy_coef)


def adaptive(entropy: Tensor, no_think: Tensor, state: EntropyState, a: Any) -> Tensor:
    """Without decoupling: the learned β_l and the target H_l for both modes."""
    return entropy_coefficients(entropy, torch.zeros_like(no_think), state)


def decoupled(entropy: Tensor, no_think: Tensor, state: EntropyState, a: Any) -> Tensor:
    """AutoTool's constraint, a coefficient and a target for each mode."""
    return entropy_coefficients(entropy, no_think, state)


# name -> (entropy (B,), no_think (B,), state, args) -> β_i (B,)
ENTROPY_REGULARISERS = {
    "none": no_bonus,
    "constant": constant,
    "adaptive": adaptive,
    "decoupled": decoupled,
}


def _modes(trajectories: list[Trajectory], a: Any) -> tuple[Tensor, Tensor]:
    """(H_i, m_i), (B,) each; `adaptive` knows no modes, so that all count as thinking."""
    entropy = torch.tensor([mean_entropy(t) for t in trajectories], dtype=torch.float64)
    blind = a.entropy_regulariser == "adaptive"
    return entropy, torch.tensor([t.mode == "no_think" and not blind for t in trajectories])


def first_entropy_state(a: Any) -> EntropyState:
    """The state before the first step; relative targets are set by `with_targets`."""
    targets = (a.target_short, a.target_long) if a.entropy_target == "absolute" else (nan, nan)
    return EntropyState(a.beta_short, a.beta_long, *targets)


def with_targets(state: EntropyState, trajectories: list[Trajectory], a: Any) -> EntropyState:
    """Relative targets that are not set yet: `--target_*` times the mean H_i of the mode's trajectories, if any.

    H_l is that of the think trajectories also for `adaptive`, which holds both modes to it [PAPERS B4].
    """
    entropy, no_think = _modes(trajectories, a)
    thinking = torch.tensor([t.mode == "think" for t in trajectories])
    for name, factor, members in (
        ("target_short", a.target_short, entropy[no_think]),
        ("target_long", a.target_long, entropy[thinking]),
    ):
        if isnan(getattr(state, name)) and not isnan(mean := members.nanmean().item()):
            state = replace(state, **{name: factor * mean})
    return state


def trajectory_betas(trajectories: list[Trajectory], state: EntropyState, a: Any) -> list[float]:
    """β_i of each trajectory of an update, by `--entropy_regulariser`."""
    return ENTROPY_REGULARISERS[a.entropy_regulariser](*_modes(trajectories, a), state, a).tolist()


def next_entropy_state(state: EntropyState, trajectories: list[Trajectory], a: Any) -> EntropyState:
    """The state after an optimizer step on these trajectories; only adaptive and decoupled learn."""
    if a.entropy_regulariser not in ("adaptive", "decoupled"):
        return state
    return update_beta_long(state, *_modes(trajectories, a), a.beta_lr)
