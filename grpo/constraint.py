"""The entropy bonus of the loss: fixed, learned, or AutoTool's by mode [2603.13348; PAPERS B4].

Symbols: B trajectories per optimizer step · H_i mean token entropy of trajectory i in nats · m_i = 1 without thinking ·
β_s, β_l coefficients and H_s, H_l targets of answers without and with thinking. β_l is learned (`update_beta_long`).
"""

from dataclasses import dataclass, replace
from math import isnan, nan
from typing import Any

import torch
from torch import Tensor

from core.segments import mean_entropy
from core.trajectory import Trajectory


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
    """`--entropy_coef` for every trajectory, in both modes and at any entropy: neither gate nor mode mask.

    So it is not AutoTool "without adaptation": that is `decoupled` with `--beta_lr 0`, whose coefficient stays.
    """
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
