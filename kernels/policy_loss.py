"""GRPO/DAPO policy loss from hidden states and a frozen lm_head: two GEMMs in all, gradients made in the forward.

Per token t with weight w (normaliser and importance weights folded in), r = exp(logp − old_logp),
k3 = exp(ref − logp) − (ref − logp) − 1, and coefficients κ (kl_coef), β_t (entropy_coef):

    loss_t = w [ −min(r A, clip(r, 1−ε_low, 1+ε_high) A) + κ k3 − β_t H ],        loss = Σ_t loss_t
    g_logp = ∂loss_t/∂logp = w [ −A r · active + κ (1 − exp(ref − logp)) ],       g_H = −w β_t
    active = not [ (A > 0 and r > 1+ε_high) or (A < 0 and r < 1−ε_low) ]

With the dual clip C (`dual_clip`, 0 = off) the surrogate of a token with A < 0 is max(min(…), C A), so that its loss
no longer grows with a ratio above C: active is false there too [Ye et al. 2020, 1912.09729; the code of ARPO and
ET-Agent: C = 3].

`policy_terms` is the only place where these formulas are written as code: the reference and the kernels both call it.
Everything in it but logp and H is known before the forward pass, so each chunk of logits is turned into its gradient
dz, and that into dhidden, while it is still in memory (the loop and its traffic are in kernels.linear_logprob_entropy).
backward only multiplies dhidden by the incoming gradient. Memory: one chunk of logits and N·H for dhidden.

Both log-ratios are clamped to ±20 before exp, with zero gradient outside, so that a token that drifted far gives a
large number and no inf. Left out: losses that need a statistic of the whole sequence of logp first.
"""

from typing import NamedTuple

import torch

from kernels.checks import IGNORE, check_linear, check_targets, check_temperature, graph_break
from kernels.linear_logprob_entropy import kept_rows, linear_logprob_entropy_reference, run_head
from kernels.logprob_entropy import accumulator

MAX_LOG_RATIO = 20.0  # nats


class PolicyTerms(NamedTuple):
    """Per-token results of `policy_terms`, each (n,).

    loss and the derivatives include the token weight; clipped_*: the weight is not 0 and the clip took the gradient
    (high: its upper bound, or the dual clip).
    """

    loss: torch.Tensor
    g_logp: torch.Tensor
    g_entropy: torch.Tensor
    ratio: torch.Tensor
    kl: torch.Tensor
    clipped_low: torch.Tensor
    clipped_high: torch.Tensor


def policy_terms(
    logp, entropy, *, token_weight, advantage, old_logp, ref_logp, entropy_coef, clip_low, clip_high, kl_coef, dual_clip
) -> PolicyTerms:
    """Loss, its two derivatives and the statistics of each token, from the formulas above; all tensors (n,)."""
    log_ratio = logp - old_logp
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = bounded.exp()
    clipped_low = (advantage < 0) & (ratio < 1 - clip_low)
    clipped_high = (advantage > 0) & (ratio > 1 + clip_high)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
    if dual_clip:
        clipped_high = clipped_high | (advantage < 0) & (ratio > dual_clip)
        surrogate = torch.where(advantage < 0, torch.maximum(surrogate, dual_clip * advantage), surrogate)
    active = (log_ratio == bounded) & ~(clipped_low | clipped_high)
    loss = -surrogate
    g_logp = -advantage * ratio * active  # what trains: autograd does not see `loss`, so change both
    kl = torch.zeros_like(logp)
    if ref_logp is not None:
        drift = ref_logp - logp
        bounded = drift.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = bounded.exp() - bounded - 1
        loss = loss + kl_coef * kl
        g_logp = g_logp + kl_coef * (1 - bounded.exp()) * (drift == bounded)
    loss = token_weight * (loss - entropy_coef * entropy)
    counts = token_weight != 0
    return PolicyTerms(
        loss,
        token_weight * g_logp,
        -token_weight * entropy_coef,
        ratio,
        kl,
        clipped_low & counts,
        clipped_high & counts,
    )


def policy_arguments(
    targets,
    dtype,
    *,
    token_weight,
    advantage,
    old_logp,
    ref_logp,
    entropy_coef,
    clip_low,
    clip_high,
    kl_coef,
    dual_clip=0.0,
) -> dict:
    """Keyword arguments of `policy_terms`: per-token ones as (N,) tensors with 0 where the target is -100.

    There logp and entropy are 0 too, so that every term and derivative is 0, whatever the caller's tensors hold.
    Raises ValueError naming the argument.
    """
    if ref_logp is None and kl_coef != 0:
        raise ValueError(f"kl_coef = {kl_coef} needs ref_logp")
    if dual_clip and dual_clip <= 1 + clip_high:
        raise ValueError(f"dual_clip = {dual_clip} must be 0 or above 1 + clip_high = {1 + clip_high}")
    ignored = targets == IGNORE
    per_token = {
        "token_weight": token_weight,
        "advantage": advantage,
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "entropy_coef": entropy_coef,
    }
    for name, value in per_token.items():
        if isinstance(value, (int, float)):
            value = torch.full(targets.shape, value, dtype=dtype, device=targets.device)
        if value is not None:
            if value.shape != targets.shape or value.device != targets.device or value.requires_grad:
                raise ValueError(
                    f"{name} must be a float or a {tuple(targets.shape)} tensor on {targets.device} without gradient, "
                    f"got {tuple(value.shape)} on {value.device}, requires_grad={value.requires_grad}"
                )
            per_token[name] = value.to(dtype).masked_fill(ignored, 0.0)
    return {**per_token, "clip_low": clip_low, "clip_high": clip_high, "kl_coef": kl_coef, "dual_clip": dual_clip}


def linear_policy_loss_reference(hidden, weight, targets, *, temperature: float = 1.0, **arguments) -> torch.Tensor:
    """The definition, on whole logits, differentiable by autograd through `policy_terms`: what tests compare with."""
    logp, entropy = linear_logprob_entropy_reference(hidden, weight, targets, temperature)
    defaults = {"ref_logp": None, "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0, "entropy_coef": 0.0}
    arguments = policy_arguments(targets, logp.dtype, **(defaults | arguments))
    return policy_terms(logp, entropy, **arguments).loss.sum()


def _select(arguments: dict, rows) -> dict:
    return {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


class _LinearPolicyLoss(torch.autograd.Function):
    """Loss and dhidden in one pass over the chunks; backward scales dhidden by the incoming gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, arguments, need_grad, triton, chunk):
        def gradients(rows, logp, entropy):
            terms = policy_terms(logp, entropy, **_select(arguments, rows))
            return terms.g_logp, terms.g_entropy

        with torch.autocast(hidden.device.type, enabled=False):
            logp, entropy, dhidden = run_head(
                hidden, weight, targets, temperature, gradients if need_grad else None, triton, chunk
            )
            terms = policy_terms(logp, entropy, **arguments)
        ctx.save_for_backward(dhidden)
        ratio = terms.ratio.masked_fill(targets == IGNORE, 0.0)
        statistics = (logp, entropy, ratio, terms.kl, terms.clipped_low, terms.clipped_high)
        ctx.mark_non_differentiable(*statistics)
        return terms.loss.sum(), *statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_loss, *_):
        (dhidden,) = ctx.saved_tensors
        return dhidden * g_loss, None, None, None, None, None, None, None


@graph_break
def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    token_weight: torch.Tensor | float,
    advantage: torch.Tensor | float,
    old_logp: torch.Tensor | float,
    ref_logp: torch.Tensor | float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    entropy_coef: torch.Tensor | float = 0.0,
    dual_clip: float = 0.0,
    temperature: float = 1.0,
    check: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum over tokens of the clipped surrogate, k3 KL and entropy terms; differentiable with respect to hidden, once.

    hidden (N, H), frozen weight (V, H), targets (N,); token_weight, advantage, old_logp, ref_logp, entropy_coef: (N,)
    without gradient, or floats. The normaliser belongs into token_weight, counted over the whole optimizer step, so
    that losses and gradients of micro-batches add up. Returns (loss, stats), fp32 (float64 if an input is), stats
    detached: logp, entropy, ratio, kl (N,), kl 0 without ref_logp; clip_low_frac and clip_high_frac, the share of the
    tokens with non-zero weight whose gradient the lower or upper clip removed, each token counting once (to average
    over micro-batches, weight by their number of such tokens).
    A target of -100 gives 0 everywhere and no gradient, whatever the other arguments hold in that row; rows and memory
    as in `linear_logprob_entropy`. No tokens: loss 0, connected to hidden.
    dual_clip: ratio from which on the loss of a token with a negative advantage is constant, 0 = none.
    Raises ValueError as `linear_logprob_entropy` does, and on per-token arguments of another shape or device or that
    require a gradient, kl_coef without ref_logp, and a dual_clip inside the clip's own bounds.
    """
    check_linear(hidden, weight)
    check_temperature(temperature)
    check_targets(targets, len(hidden), len(weight), hidden.device, check)
    arguments = policy_arguments(
        targets,
        accumulator(hidden, weight),
        token_weight=token_weight,
        advantage=advantage,
        old_logp=old_logp,
        ref_logp=ref_logp,
        entropy_coef=entropy_coef,
        clip_low=clip_low,
        clip_high=clip_high,
        kl_coef=kl_coef,
        dual_clip=dual_clip,
    )
    need_grad = hidden.requires_grad and torch.is_grad_enabled()
    keep = None if hidden.is_cuda else kept_rows(targets)
    if keep is not None:
        hidden, N, targets = hidden.index_select(0, keep), len(targets), targets[keep]
        arguments = _select(arguments, keep)
    loss, *columns, clipped_low, clipped_high = _LinearPolicyLoss.apply(
        hidden, weight, targets, float(temperature), arguments, need_grad, hidden.is_cuda, None
    )
    if keep is not None:
        columns = [column.new_zeros(N).index_copy(0, keep, column) for column in columns]
    stats = dict(zip(("logp", "entropy", "ratio", "kl"), columns))
    tokens = (arguments["token_weight"] != 0).sum().clamp_min(1)
    stats |= {"clip_low_frac": clipped_low.sum() / tokens, "clip_high_frac": clipped_high.sum() / tokens}
    return loss, stats
