"""`--check`: what must hold of masks, log-probs and gradients in every step, verified while training runs.

- a group shares its prompt ids, and ids, text and spans of a response describe the same tokens
- the sampler gave each token the log-probability that training gives it, up to rounding (reported by span kind)
- tokens with loss_mask 0 get no gradient from the loss
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.conversation import decode
from core.model import Batch, causal_lm
from core.trajectory import Trajectory, groups_of

BAND = (0.9, 1.1)  # ratios of training to sampling probability outside of it are counted


class BrokenInvariant(RuntimeError):
    """Something that must hold does not; the message names trajectory and values."""


def check_trajectories(trajectories: list[Trajectory], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise BrokenInvariant where prompt, ids, text, mask and spans of sampled trajectories contradict each other."""
    for group in groups_of(trajectories):
        for t in group:
            name, first = f"trajectory {t.question_id}/{t.sample_idx}", group[0]
            if t.token_ids[: t.prompt_len] != first.token_ids[: first.prompt_len]:
                raise BrokenInvariant(f"{name} has another prompt than the first of its group")
            text = decode(tokenizer, t.token_ids[t.prompt_len :])
            if text != t.response_text and "\ufffd" not in t.response_text:  # a character cut in two decodes otherwise
                raise BrokenInvariant(f"{name}: its ids do not decode to its text {t.response_text!r}")
            ends = [t.prompt_len, *(s.end for s in t.spans)]
            starts = [*(s.start for s in t.spans), len(t.token_ids)]
            if ends != starts:
                raise BrokenInvariant(f"{name}: its spans leave gaps: {t.spans}")
            if t.rollout_logp is None or any(m and not v <= 0 for v, m in zip(t.rollout_logp, t.loss_mask)):
                raise BrokenInvariant(f"{name} has no log-probabilities of its sampler: {t.rollout_logp}")


def sampler_mismatch(trajectories: list[Trajectory]) -> dict[str, float]:
    """Training minus sampling log-probability (nats per token), by span kind and over all.

    check/KIND/mean and /max of the absolute difference, /outside: share of ratios outside 0.9–1.1.
    """
    differences: dict[str, list[float]] = defaultdict(list)
    for t in trajectories:
        for span in t.spans:
            for i in range(span.start, span.end):
                if t.loss_mask[i]:
                    differences[span.kind].append(t.old_logp[i] - t.rollout_logp[i])
    differences["all"] = [d for values in differences.values() for d in values]
    report = {}
    for kind, values in sorted(differences.items()):
        ratios = torch.tensor(values, dtype=torch.float64).exp()
        outside = (ratios < BAND[0]) | (ratios > BAND[1])
        report[f"check/{kind}/mean"] = fmean(map(abs, values)) if values else 0.0
        report[f"check/{kind}/max"] = max(map(abs, values), default=0.0)
        report[f"check/{kind}/outside"] = outside.double().mean().item() if values else 0.0
    return report


@contextmanager
def masked_tokens_have_no_gradient(model: torch.nn.Module, batch: Batch) -> Iterator[None]:
    """Inside: a backward pass that reaches the hidden state which predicts a masked token is a BrokenInvariant."""
    predicts = torch.zeros_like(batch.loss_mask)  # (B, T): the hidden state at t - 1 predicts token t
    predicts[:, :-1] = batch.loss_mask[:, 1:]

    def verify(gradient: Tensor) -> None:  # (B, T, H)
        leaked = (gradient.abs().amax(-1) > 0) & ~predicts
        if leaked.any():
            row, at = leaked.nonzero()[0].tolist()
            raise BrokenInvariant(f"the loss has a gradient at the hidden state of row {row}, position {at}")

    def watch(module, inputs, output) -> None:
        output.last_hidden_state.register_hook(verify)

    handle = causal_lm(model).base_model.register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()
