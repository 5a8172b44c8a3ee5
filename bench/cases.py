"""Inputs that look like a real policy's, for timing and testing the kernels, and the kernels' errors on them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.linear_logprob_entropy import head_logits, linear_logprob_entropy, linear_logprob_entropy_reference
from kernels.logprob_entropy import logprob_entropy, logprob_entropy_reference

TEMPERATURE = 0.9
LIMITS = {"logp": 1e-4, "entropy": 1e-4, "gradient of logp": 3e-3, "gradient of entropy": 5e-3}


class Case(NamedTuple):
    """Inputs of one call; targets are -100 on the tokens that are not trained on."""

    hidden: torch.Tensor  # (N, H), requires grad
    weight: torch.Tensor  # (V, H)
    targets: torch.Tensor  # (N,)
    keep: torch.Tensor | None  # (n,) indices of the trained tokens; None: all of them
    arguments: dict  # of linear_policy_loss, with (N,) tensors
    logits: torch.Tensor | None  # (N, V), for the operations that start from logits
    temperature: float


def make_head(V: int, H: int, device: torch.device) -> torch.Tensor:
    """A bf16 head (V, H) whose logits have standard deviation 5 for Gaussian hidden states."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.empty(V, H, device=device, dtype=torch.bfloat16).normal_(generator=generator) * (5 / H**0.5)


def make_case(N: int, weight: torch.Tensor, trained: float = 1.0, logits: bool = False, seed: int = 1) -> Case:
    """Gaussian hidden states, targets sampled from the softmax, a policy that moved a little since it sampled."""
    (V, H), device = weight.shape, weight.device
    generator = torch.Generator(device).manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator, device=device)

    hidden = random(N, H).bfloat16()
    targets = torch.empty(N, dtype=torch.int64, device=device)
    for rows in torch.arange(N, device=device).split(512):
        z = head_logits(hidden[rows], weight, torch.empty(len(rows), V, device=device)) / TEMPERATURE
        targets[rows] = torch.multinomial(z.softmax(-1), 1, generator=generator).squeeze(1)
    logp, _ = linear_logprob_entropy(hidden, weight, targets, TEMPERATURE)
    keep = None
    if trained < 1:
        order = torch.randperm(N, generator=generator, device=device)
        keep, dropped = order[: int(N * trained)].sort().values, order[int(N * trained) :]
        targets[dropped] = -100
    arguments = {
        "token_weight": torch.full((N,), 1 / N, device=device),
        "advantage": random(N),
        "old_logp": logp + 0.1 * random(N),
        "ref_logp": logp + 0.1 * random(N),
        "entropy_coef": 0.01,
        "kl_coef": 0.04,
        "clip_low": 0.2,
        "clip_high": 0.28,
    }
    z = F.linear(hidden, weight) if logits else None
    return Case(hidden.requires_grad_(), weight, targets, keep, arguments, z, TEMPERATURE)


def kept(case: Case) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """hidden, targets and arguments of the trained tokens alone: what a trainer hands to the kernels."""
    if case.keep is None:
        return case.hidden, case.targets, case.arguments
    select = {k: v[case.keep] if isinstance(v, torch.Tensor) else v for k, v in case.arguments.items()}
    return case.hidden.index_select(0, case.keep), case.targets[case.keep], select


def loop_errors(loop: Callable, N: int, H: int, V: int, device: torch.device) -> dict[str, float]:
    """Largest error of logp and entropy, relative Frobenius error of two gradients, of `run_head` or a like function.

    The reference is float64 autograd from the same bf16 inputs, 48 rows at a time.
    """
    case = make_case(N, make_head(V, H, device))
    hidden, ones, zeros = case.hidden.detach(), torch.ones(N, device=device), torch.zeros(N, device=device)
    upstream = {"gradient of logp": (case.arguments["advantage"], zeros), "gradient of entropy": (zeros, ones)}
    values, gradients = [], {}
    for name, (a, b) in upstream.items():
        *values, g = loop(hidden, case.weight, case.targets, TEMPERATURE, lambda rows, *_, a=a, b=b: (a[rows], b[rows]))
        gradients[name] = g.double()
    exact_values, exact_gradients = [], {name: [] for name in upstream}
    weight = case.weight.double()
    for rows in torch.arange(N, device=device).split(48):
        h = hidden[rows].double().requires_grad_()
        exact = linear_logprob_entropy_reference(h, weight, case.targets[rows], TEMPERATURE)
        exact_values.append(torch.stack(exact).detach())
        for name, pair in upstream.items():
            (g,) = torch.autograd.grad(exact, h, [g[rows].double() for g in pair], retain_graph=True)
            exact_gradients[name].append(g)
    difference = (torch.stack(values) - torch.cat(exact_values, 1)).abs().amax(1)
    errors = dict(zip(("logp", "entropy"), difference.tolist(), strict=True))
    for name, g in gradients.items():
        exact = torch.cat(exact_gradients[name])
        errors[name] = ((g - exact).norm() / exact.norm()).item()
    return errors


def past_int32_error(device: torch.device) -> float:
    """Error of logp, entropy and gradient in the last rows of (15000, 151936) bf16 logits: offsets past 2^31."""
    logits = torch.empty(15000, 151936, device=device, dtype=torch.bfloat16).normal_().mul_(4).requires_grad_()
    targets = torch.randint(0, 151936, (15000,), device=device)
    ours = logprob_entropy(logits, targets, TEMPERATURE)
    tail = logits[-4:].detach().double().requires_grad_()
    exact = logprob_entropy_reference(tail, targets[-4:], TEMPERATURE)
    (g,) = torch.autograd.grad((ours[0] + ours[1]).sum(), logits)
    (g_exact,) = torch.autograd.grad((exact[0] + exact[1]).sum(), tail)
    error = max((a[-4:] - b).abs().max().item() for a, b in zip(ours, exact, strict=True))
    rounding = 2**-8 * g_exact.abs() + 1e-6  # of a bf16 gradient
    return max(error, ((g[-4:].double() - g_exact).abs() - rounding).max().item())
