"""Other implementations of the benchmark's operations; imported by kernels.benchmark alone.

BASELINES names for each operation the lines (build, wrap, note): build() imports a library, or fails with the reason
for which the line is skipped; wrap turns what it returns into prepare(case) → timed(), of which only timed is measured.
The note says what a line leaves out or does beside. All lines of an operation get the same inputs and the same loss.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.cases import Case
from kernels.logprob_entropy import logprob_entropy_reference
from kernels.policy_loss import policy_arguments, policy_terms

Prepare = Callable[[Case], Callable[[], object]]


# ---------------------------------------------------------------------------------------------- libraries


def eager():
    def statistics(logits, targets, temperature):
        log_p = torch.log_softmax(logits.float() / temperature, -1)
        logp = log_p.gather(1, targets.clamp_min(0)[:, None]).squeeze(1)
        return logp, -(log_p.exp() * log_p).sum(-1)

    return statistics


def reference():
    return logprob_entropy_reference


def trl():
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def statistics(logits, targets, temperature):
        logits = logits / temperature
        return selective_log_softmax(logits, targets.clamp_min(0)), entropy_from_logits(logits)

    return statistics


def compiled(build):
    return lambda: torch.compile(build())


def liger_selective():
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    def statistics(logits, targets, temperature):  # takes (B, L + 1, V) and drops the last row
        return fused_selective_log_softmax(logits[None], targets.clamp_min(0)[None, :-1], temperature)

    return statistics


def verl():
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda h, w, y, temperature: linear_cross_entropy(h, w, y.clamp_min(0), temperature, "none", None)


def liger_scaled():
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def statistics(hidden, weight, targets, temperature):
        args = (hidden, weight, targets, temperature, -100, 1, True)
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(*args)
        return -nll, entropy

    return statistics


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


def liger_flce():
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda h, w, y: liger_fused_linear_cross_entropy(h, w, y, reduction="sum")


def torch_linear():
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda h, w, y: F.linear_cross_entropy(h, w, y, reduction="sum", options=options)


def cut_cross_entropy():
    from cut_cross_entropy import linear_cross_entropy

    return lambda h, w, y: linear_cross_entropy(h, w, y, reduction="sum")


def quack():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda h, w, y: chunked_linear_cross_entropy(h, w, y, reduction="sum")


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


def via_logits(statistics):
    """The same signature as a fused function, over whole logits in the head's dtype."""
    return lambda h, w, y, temperature: statistics(F.linear(h, w), y, temperature)


def linear_forward(statistics) -> Prepare:
    return lambda case: torch.no_grad()(lambda: statistics(case.hidden, case.weight, case.targets, case.temperature))


def policy_loss(statistics) -> Prepare:
    def prepare(case):
        return lambda: policy_gradient(*statistics(case.hidden, case.weight, case.targets, case.temperature), case)

    return prepare


def own_loss(loss) -> Prepare:
    return lambda case: lambda: torch.autograd.grad(loss(case), case.hidden)


def cross_entropy_forward(call) -> Prepare:
    return lambda case: torch.no_grad()(lambda: call(case.hidden, case.weight, case.targets))


def cross_entropy(call) -> Prepare:
    return own_loss(lambda case: call(case.hidden, case.weight, case.targets))


def forward_of_logits(statistics) -> Prepare:
    return linear_forward(via_logits(statistics))


def loss_of_logits(statistics) -> Prepare:
    return policy_loss(via_logits(statistics))


CROSS_ENTROPY = "cross-entropy only: no entropy, no temperature, no policy loss"
BASELINES: dict[str, dict[str, tuple[Callable, Callable, str]]] = {
    "logits_forward": {
        "torch eager": (eager, logits_forward, ""),
        "torch.compile": (compiled(eager), logits_forward, ""),
        "our torch reference": (reference, logits_forward, ""),
        "TRL": (trl, logits_forward, "bf16 results"),
        "TRL compiled": (compiled(trl), logits_forward, "bf16 results"),
        "liger selective_log_softmax": (liger_selective, logits_forward, "no entropy"),
    },
    "logits_backward": {
        "torch eager": (eager, logits_backward, ""),
        "torch.compile": (compiled(eager), logits_backward, ""),
        "our torch reference": (reference, logits_backward, ""),
        "TRL": (trl, logits_backward, ""),
    },
    "linear_forward": {
        "torch eager": (eager, forward_of_logits, "bf16 logits"),
        "torch.compile": (compiled(eager), forward_of_logits, "bf16 logits"),
        "TRL": (trl, forward_of_logits, "bf16 logits and results"),
        "liger scaled CE": (liger_scaled, linear_forward, ""),
        "verl": (verl, linear_forward, "early versions are wrong unless V % 1024 == 0"),
        "F.linear_cross_entropy": (torch_linear, cross_entropy_forward, CROSS_ENTROPY),
        "cut-cross-entropy": (cut_cross_entropy, cross_entropy_forward, CROSS_ENTROPY),
        "quack": (quack, cross_entropy_forward, CROSS_ENTROPY),
    },
    "policy_loss": {
        "torch eager": (eager, loss_of_logits, "bf16 logits"),
        "torch.compile": (compiled(eager), loss_of_logits, "bf16 logits"),
        "TRL": (trl, loss_of_logits, "bf16 logits"),
        "liger scaled CE": (liger_scaled, policy_loss, "also a gradient for the weight"),
        "verl": (verl, policy_loss, "also a gradient for the weight"),
        "liger chunked GRPO": (liger_grpo, own_loss, "no entropy"),
        "F.linear_cross_entropy": (torch_linear, cross_entropy, CROSS_ENTROPY),
        "liger FLCE": (liger_flce, cross_entropy, CROSS_ENTROPY),
        "cut-cross-entropy": (cut_cross_entropy, cross_entropy, CROSS_ENTROPY),
        "quack": (quack, cross_entropy, CROSS_ENTROPY),
    },
}
