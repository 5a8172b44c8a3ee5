"""One optimizer step of GRPO: micro-batches, their scores by the training forward, and the clipped update.

1. pack     trajectories in order of length, cut by number or by a token budget
2. score    log-probs and entropies by the no-grad training forward, so the first ratio is exactly 1
3. update   Σ of the weighted token losses over all micro-batches, one gradient sum over the processes, clip, step
"""

import math
from contextlib import nullcontext
from statistics import stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import kernels
from core import distributed
from core.model import Batch, collate, device, head_weight, hidden_of_targets, packed, token_stats, use_reference
from core.trajectory import Trajectory, groups_of
from eval.behaviour import void_turns
from grpo.advantages import MIN_STD, token_weights
from grpo.checks import masked_tokens_have_no_gradient


class MicroBatch(NamedTuple):
    """Trajectories that share a forward pass; their composition is the same in scoring and in every update."""

    trajectories: list[Trajectory]
    batch: Batch
    ref_logp: Tensor | None  # (N,) over the batch's trained tokens


def micro_batches(part: list[Trajectory], model: torch.nn.Module, pad_id: int, args: Any) -> list[MicroBatch]:
    """Pack one update's trajectories and score each: fills `old_logp` and `entropy`."""
    for t in part:
        if not t.sampled:
            raise ValueError(f"trajectory {t.question_id}/{t.sample_idx} was not sampled; RL trains on samples only")
    result = []
    for rows in packed(part, args.per_device_train_batch_size, args.max_tokens_per_micro_batch):
        batch = collate(rows, pad_id, device())
        with torch.no_grad():
            logp, entropy = token_stats(model, batch, args.temperature)
        for t, logps, entropies in zip(rows, logp.tolist(), entropy.tolist()):
            t.old_logp, t.entropy = logps[: len(t.token_ids)], entropies[: len(t.token_ids)]
        ref_logp = None
        if args.beta > 0 or args.indicator == "reference":
            with use_reference(model):
                logp, entropy = token_stats(model, batch, args.temperature)  # (B, T)
            ref_logp = logp[batch.loss_mask] if args.beta > 0 else None  # (N,)
            for t, entropies in zip(rows, entropy.tolist()) if args.indicator == "reference" else ():
                t.ref_entropy = entropies[: len(t.token_ids)]
        result.append(MicroBatch(rows, batch, ref_logp))
    return result


def update(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    part: list[MicroBatch],
    everyone: list[Trajectory],
    betas: list[float],
    args: Any,
) -> dict[str, float]:
    """One optimizer step, and one of the learning rate's schedule; a non-finite loss or gradient skips both.

    part: this process's micro-batches. everyone: the update's trajectories of all processes, over which the token
    weights are normalised; betas: their entropy coefficients β_i [2603.13348, PAPERS B4], in the same order.
    """
    dropped = zero_variance_ids(everyone) if args.skip_zero_variance else set()
    kept = [(t, beta) for t, beta in zip(everyone, betas, strict=True) if t.question_id not in dropped]
    lengths = [t.completion_tokens * trains(t, args) for t, _ in kept]
    weights = token_weights(lengths, args.loss_type, args.max_completion_length)
    # the kernel's entropy term has the token weight as a factor; ours is mean_i β_i H_i under every loss type
    bonuses = [beta / (len(kept) * n * w) if n else 0.0 for (_, beta), n, w in zip(kept, lengths, weights)]
    row_terms = {(t.question_id, t.sample_idx): terms for (t, _), *terms in zip(kept, weights, bonuses)}
    tokens = max(sum(t.completion_tokens for t in everyone), 1)
    totals = {"loss": 0.0, "kl": 0.0, "clip_ratio/low_mean": 0.0, "clip_ratio/high_mean": 0.0}
    for mb in part:
        per_row = [row_terms.get((t.question_id, t.sample_idx), [0.0, 0.0]) for t in mb.trajectories]
        if args.beta == 0 and not any(w and (b or any(t.advantage)) for t, (w, b) in zip(mb.trajectories, per_row)):
            continue  # no gradient from any of its trajectories
        with masked_tokens_have_no_gradient(model, mb.batch) if args.check else nullcontext():
            loss, stats = policy_loss(model, mb, per_row, args)
        loss.backward()
        share = sum(t.completion_tokens for t, (weight, _) in zip(mb.trajectories, per_row) if weight) / tokens
        totals["loss"] += loss.item()
        totals["kl"] += stats["kl"].sum().item() / tokens
        totals["clip_ratio/low_mean"] += float(stats["clip_low_frac"]) * share
        totals["clip_ratio/high_mean"] += float(stats["clip_high_frac"]) * share
    trained = [p for p in model.parameters() if p.requires_grad]
    distributed.sum_gradients(trained)
    totals = distributed.sum_values(totals)
    norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm or math.inf).item()
    finite = math.isfinite(totals["loss"]) and math.isfinite(norm)
    if finite:
        optimizer.step()
        scheduler.step()
    else:
        tqdm.write(f"skipped an update: loss {totals['loss']}, gradient norm {norm}")
        totals = {name: 0.0 for name in totals}
    optimizer.zero_grad()
    return {**totals, "grad_norm": norm if finite else 0.0, "skipped_updates": float(not finite)}


def policy_loss(model: torch.nn.Module, mb: MicroBatch, row_terms: list, args: Any) -> tuple[Tensor, dict]:
    """The micro-batch's share of the step's loss, and its token statistics (maths: kernels/policy_loss.py).

    row_terms: (token weight, entropy coefficient) of each trajectory.
    """
    mask = mb.batch.loss_mask

    def flat(rows: list[list[float]]) -> Tensor:  # per-token lists -> (N,) in the order of hidden_of_targets
        return torch.tensor([v for row, t in zip(rows, mb.trajectories) for v, m in zip(row, t.loss_mask) if m])

    hidden, targets = hidden_of_targets(model, mb.batch)  # (N, H), (N,)
    terms = torch.tensor(row_terms, device=mask.device)[:, :, None].expand(-1, -1, mask.shape[1])  # (B, 2, T)
    weight, bonus = terms.unbind(1)  # (B, T)
    return kernels.linear_policy_loss(
        hidden,
        head_weight(model),
        targets,
        token_weight=weight[mask],
        advantage=flat([t.advantage for t in mb.trajectories]).to(mask.device),
        old_logp=flat([t.old_logp for t in mb.trajectories]).to(mask.device),
        ref_logp=mb.ref_logp,
        clip_low=args.epsilon,
        clip_high=args.epsilon_high,
        kl_coef=args.beta,
        entropy_coef=bonus[mask],
        temperature=args.temperature,
        check=args.check,
    )


def trains(t: Trajectory, args: Any) -> bool:
    """False for trajectories that a flag takes out of the loss."""
    if args.mask_truncated_completions and t.finish != "eos":
        return False
    return not (args.mask_void_turns and void_turns(t))


def zero_variance_ids(trajectories: list[Trajectory]) -> set[str]:
    """Questions whose group of rewards does not vary: their advantages are all 0."""
    return {group[0].question_id for group in groups_of(trajectories) if reward_spread(group) < MIN_STD}


def reward_spread(group: list[Trajectory]) -> float:
    """Sample standard deviation of a group's total rewards."""
    return stdev(t.rewards["total"] for t in group) if len(group) > 1 else 0.0
