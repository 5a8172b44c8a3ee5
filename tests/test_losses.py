"""Advantages and token weights against numbers worked out by hand.

    python -m pytest tests/test_losses.py
"""

from types import SimpleNamespace
from typing import get_args

import pytest
import torch

import kernels
from grpo.advantages import ADVANTAGES, LossType, group_advantages, token_weights
from grpo.constraint import (
    EntropyState,
    entropy_coefficients,
    first_entropy_state,
    next_entropy_state,
    trajectory_betas,
    update_beta_long,
    with_targets,
)


def test_group_advantages_use_the_sample_std():
    """1, 2, 3, 6: mean 3, sample variance 14/3."""
    std = (14 / 3) ** 0.5
    assert group_advantages([1.0, 2.0, 3.0, 6.0]) == pytest.approx([x / (std + 1e-6) for x in (-2, -1, 0, 3)])
    assert group_advantages([1.0, 2.0, 3.0, 6.0], divide_by_std=False) == [-2.0, -1.0, 0.0, 3.0]


@pytest.mark.parametrize("totals", [[0.7] * 4, [0.7, 0.7 + 1e-9], [3.0]])
def test_groups_without_signal_get_zero(totals):
    assert group_advantages(totals) == [0.0] * len(totals)
    assert group_advantages(totals, divide_by_std=False) == [0.0] * len(totals)


@pytest.mark.parametrize("name, scale", [("grpo", 0.5**0.5), ("grpo_no_std", 0.5)])
def test_advantages_reach_model_tokens_only(name, scale):
    group = [SimpleNamespace(loss_mask=[0, 1, 0, 1]), SimpleNamespace(loss_mask=[0, 1])]
    out = ADVANTAGES[name](group, [{"total": 1.0}, {"total": 0.0}], None)
    assert out[0] == pytest.approx([0, scale, 0, scale], rel=1e-5)
    assert out[1] == pytest.approx([0, -scale], rel=1e-5)


def test_token_weights_by_hand():
    """Three rows of 2, 6 and 0 tokens (the last is masked): B = 3, 8 tokens, L_max = 10."""
    assert token_weights([2, 6, 0], "grpo", 10) == pytest.approx([1 / 6, 1 / 18, 0])
    assert token_weights([2, 6, 0], "dapo", 10) == pytest.approx([1 / 8, 1 / 8, 0])
    assert token_weights([2, 6, 0], "dr_grpo", 10) == pytest.approx([1 / 30, 1 / 30, 0])


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_nothing_left_to_train_on(loss_type):
    assert token_weights([0, 0], loss_type, 10) == [0.0, 0.0]


def test_unknown_loss_type():
    with pytest.raises(ValueError, match="'ppo'"):
        token_weights([1], "ppo", 10)


# ---------------------------------------------------------------------------------------------------- entropy

STATE = EntropyState(beta_short=0.3, beta_long=0.05, target_short=0.1, target_long=0.2)
H = torch.tensor([0.1, 0.11, 0.2, 0.21, float("nan")], dtype=torch.float64)


def test_defaults_are_the_best_published_cell():
    assert EntropyState() == EntropyState(beta_short=0.0, beta_long=1e-2, target_short=0.1, target_long=0.2)


def test_coefficients_of_all_four_cases():
    """short below and above H_s, long below and above H_l; a target counts as below it."""
    no_think = torch.tensor([True, True, False, False, False])
    assert entropy_coefficients(H, no_think, STATE).tolist() == [0.3, 0.0, 0.05, 0.0, 0.0]


def test_beta_long_moves_both_ways_and_stays_in_its_range():
    think = torch.zeros(2, dtype=torch.bool)
    low, high = torch.tensor([0.0, 0.2]), torch.tensor([0.2, 0.6])
    assert update_beta_long(STATE, low, think, 0.1).beta_long == pytest.approx(0.05 + 0.1 * (0.2 - 0.1))
    assert update_beta_long(STATE, high, think, 0.1).beta_long == pytest.approx(0.05 - 0.1 * (0.4 - 0.2))
    assert update_beta_long(STATE, high, think, 10.0).beta_long == 0.0
    assert update_beta_long(STATE, low, think, 100.0).beta_long == 1.0
    assert update_beta_long(STATE, low, think, 0.1).beta_short == 0.3


def test_beta_long_looks_at_think_trajectories_only():
    mixed = update_beta_long(STATE, torch.tensor([9.0, 0.1, float("nan")]), torch.tensor([True, False, False]), 0.1)
    assert mixed.beta_long == pytest.approx(0.05 + 0.1 * 0.1)
    assert update_beta_long(STATE, torch.tensor([9.0, 0.0]), torch.tensor([True, True]), 0.1) == STATE
    assert update_beta_long(STATE, torch.tensor([float("nan")]), torch.tensor([False]), 0.1) == STATE


def trajectory(mode, entropy):
    return SimpleNamespace(mode=mode, entropy=[0.0, *entropy], completion_tokens=len(entropy))


BATCH = [trajectory("think", [0.1, 0.2]), trajectory("no_think", [0.05]), trajectory("no_think", [0.3]),
         trajectory("think", [0.4])]  # fmt: skip


@pytest.mark.parametrize(
    "name, betas, beta_long",
    [
        ("none", [0, 0, 0, 0], 0.05),
        ("constant", [0.7] * 4, 0.05),
        ("adaptive", [0.05, 0.05, 0, 0], 0.05 - 0.1 * (0.225 - 0.2)),  # mean of .15, .05, .3, .4
        ("decoupled", [0.05, 0.3, 0, 0], 0.05 - 0.1 * (0.275 - 0.2)),  # mean of .15, .4
    ],
)
def test_regularisers_by_hand(name, betas, beta_long):
    flags = SimpleNamespace(entropy_regulariser=name, entropy_coef=0.7, beta_lr=0.1)
    assert trajectory_betas(BATCH, STATE, flags) == pytest.approx(betas)
    assert next_entropy_state(STATE, BATCH, flags).beta_long == pytest.approx(beta_long)


def test_relative_targets_are_set_where_a_mode_first_appears():
    flags = SimpleNamespace(entropy_target="relative", entropy_regulariser="decoupled", beta_short=0.3, beta_long=0.05)
    flags.target_short, flags.target_long, flags.beta_lr = 1.0, 2.0, 0.1
    state = first_entropy_state(flags)
    assert trajectory_betas(BATCH, state, flags) == [0, 0, 0, 0] and next_entropy_state(state, BATCH, flags) == state
    state = with_targets(state, BATCH[1:3], flags)
    assert state.target_short == pytest.approx(0.175) and state.target_long != state.target_long
    state = with_targets(state, BATCH, flags)
    assert state.target_short == pytest.approx(0.175) and state.target_long == pytest.approx(2 * 0.275)
    assert with_targets(state, BATCH[:1], flags) == state
    flags.entropy_regulariser = "adaptive"  # one target for both modes, that of thinking
    assert with_targets(first_entropy_state(flags), BATCH, flags).target_long == pytest.approx(2 * 0.275)


def test_the_entropy_term_raises_entropy_only_where_it_is_active():
    """A gradient step through the fused loss on four trajectories of one token, of which the first and third act."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weight, targets = torch.randn(16, 8, generator=generator, dtype=torch.float64), torch.arange(4)
    logp, before = kernels.linear_logprob_entropy(hidden.detach(), weight, targets)
    state = EntropyState(0.5, 0.5, target_short=before[0].item(), target_long=before[2].item())
    no_think = torch.tensor([True, True, False, False])
    entropy = torch.stack([before[0], before[0] + 1, before[2], before[2] + 1])
    loss, _ = kernels.linear_policy_loss(
        hidden, weight, targets, token_weight=0.25, advantage=0.0, old_logp=logp,
        entropy_coef=entropy_coefficients(entropy, no_think, state),
    )  # fmt: skip
    loss.backward()
    assert hidden.grad[[1, 3]].abs().max() == 0 < hidden.grad[[0, 2]].abs().max()
    _, after = kernels.linear_logprob_entropy(hidden.detach() - 0.1 * hidden.grad, weight, targets)
    assert (after > before).tolist() == [True, False, True, False] and torch.equal(after[[1, 3]], before[[1, 3]])
