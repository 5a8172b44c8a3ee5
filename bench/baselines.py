"""Other people's implementations of what our kernels compute, for bench/kernels.py to time on the same inputs and loss.

BASELINES names for each operation the lines (build, note). build() imports a library, or fails with the reason for
which the line is skipped, and returns prepare(case) → timed(), of which only timed is measured. The note says what a
line leaves out or does beside.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.cases import Case
from kernels.logprob_entropy import logprob_entropy_reference
from kernels.policy_loss import policy_arguments, policy_terms

Prepare = Callable[[Case], Callable[[], object]]


# ------------------------------------------------------- (logits, targets, temperature) -> (logp, entropy)


def eager():
    def statistics(logits, targets, temperature):
        log_p = torch.log_softmax(logits.float() / temperature, -1)
        logp = log_p.gather(1, targets.clamp_min(0)[:, None]).squeeze(1)
        return logp, -(log_p.exp() * log_p).sum(-1)

    return statistics


def compiled():
    return torch.compile(eager())


def reference():
    return logprob_entropy_reference


def trl():
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def statistics(logits, targets, temperature):
        logits = logits / temperature
        return selective_log_softmax(logits, targets.clamp_min(0)), entropy_from_logits(logits)

    return statistics


# ----------------------------------------------- (hidden, weight, targets, temperature) -> (logp, entropy)


def via_logits(build):
    """The same signature as a fused function, over whole logits in the head's dtype."""

    def built():
        statistics = build()
        return lambda h, w, y, temperature: statistics(F.linear(h, w), y, temperature)

    return built


def liger_scaled():
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def statistics(hidden, weight, targets, temperature):
        args = (hidden, weight, targets, temperature, -100, 1, True)
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(*args)
        return -nll, entropy

    return statistics


# ---------------------------------------------------------------------------------------- case -> a loss


def liger_grpo():
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def loss(case):
        B = 8 if len(case.targets) % 8 == 0 else 1  # its loss takes sequences: (B, L, …), one advantage for each

        def rows(t):
            return t.view(B, -1, *t.shape[1:])

        targets = rows(case.targets)
        module = LigerFusedLinearGRPOLoss(beta=case.arguments["kl_coef"], temperature=case.temperature)
        advantages = rows(case.arguments["advantage"])[:, 0].contiguous()
        ref, old = (rows(case.arguments[name]) for name in ("ref_logp", "old_logp"))
        mask = (targets != -100).int()
        args = (rows(case.hidden), case.weight, targets.clamp_min(0), mask, advantages)
        return module(*args, ref_per_token_logps=ref, old_per_token_logps=old)[0]

    return loss


def cut_cross_entropy():
    from cut_cross_entropy import linear_cross_entropy

    return lambda case: linear_cross_entropy(case.hidden, case.weight, case.targets, reduction="sum")


# ------------------------------------------------------------------------------------------ what is timed


def policy_gradient(logp: torch.Tensor, entropy: torch.Tensor, case: Case) -> torch.Tensor:
    """Policy loss from full-length logp and entropy, and its gradient for hidden, by autograd."""
    arguments = policy_arguments(case.targets, torch.float32, **case.arguments)
    loss = policy_terms(logp.float(), entropy.float(), **arguments).loss.sum()
    return torch.autograd.grad(loss, case.hidden)[0]


def logits_forward(statistics) -> Prepare:
    return lambda case: lambda: statistics(case.logits, case.targets, case.temperature)


def logits_backward(statistics) -> Prepare:
    def prepare(case):
        logits = case.logits.detach().requires_grad_()
        logp, entropy = statistics(logits, case.targets, case.temperature)
        total = (logp + 0.01 * entropy).sum()
        return lambda: torch.autograd.grad(total, logits)

    return prepare


def linear_forward(statistics) -> Prepare:
    return lambda case: torch.no_grad()(lambda: statistics(case.hidden, case.weight, case.targets, case.temperature))


def policy_loss(statistics) -> Prepare:
    def prepare(case):
        return lambda: policy_gradient(*statistics(case.hidden, case.weight, case.targets, case.temperature), case)

    return prepare


def loss_forward(loss) -> Prepare:
    return lambda case: torch.no_grad()(lambda: loss(case))


def loss_gradient(loss) -> Prepare:
    return lambda case: lambda: torch.autograd.grad(loss(case), case.hidden)


LOGITS = {
    "torch eager": (eager, ""),
    "torch.compile": (compiled, ""),
    "our torch reference": (reference, ""),
    "TRL": (trl, "bf16 results"),
}
LINEAR = {
    "torch eager": (via_logits(eager), "bf16 logits"),
    "torch.compile": (via_logits(compiled), "bf16 logits"),
    "TRL": (via_logits(trl), "bf16 logits"),
    "liger scaled CE": (liger_scaled, "with gradients also one for the weight"),
}
LOSSES = {"cut-cross-entropy": (cut_cross_entropy, "cross-entropy only: no entropy, no temperature, no policy loss")}


def timing(lines: dict, wrap: Callable) -> dict[str, tuple[Callable[[], Prepare], str]]:
    """The lines, with what they build wrapped into what is timed."""
    return {name: (lambda build=build: wrap(build()), note) for name, (build, note) in lines.items()}


BASELINES: dict[str, dict[str, tuple[Callable[[], Prepare], str]]] = {
    "logits_forward": timing(LOGITS, logits_forward),
    "logits_backward": timing(LOGITS, logits_backward),
    "linear_forward": timing(LINEAR, linear_forward) | timing(LOSSES, loss_forward),
    "policy_loss": timing(LINEAR, policy_loss)
    | timing(LOSSES | {"liger chunked GRPO": (liger_grpo, "no entropy")}, loss_gradient),
}
