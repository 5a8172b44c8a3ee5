"""The kernels on CUDA: the edge set compiled, bf16 against float64 from the same inputs, offsets past 2^31, memory.

Run: pytest tests/test_kernels_gpu.py -m gpu
"""

import math

import pytest
import torch

from bench.kernels import correctness
from kernels import linear_logprob_entropy, linear_policy_loss, logprob_entropy
from kernels.linear_logprob_entropy import linear_logprob_entropy_reference
from kernels.logprob_entropy import BLOCK, logprob_entropy_reference
from kernels.policy_loss import linear_policy_loss_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def random(*size, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (scale * torch.randn(*size, device="cuda", generator=generator)).to(dtype)


def random_targets(N, V, seed=0):
    targets = torch.randint(0, V, (N,), device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
    if N:
        targets[-1] = V - 1
    if N > 4:
        targets[1] = -100
    return targets


@pytest.mark.parametrize("V", [1, 2, 1000, 1003, BLOCK - 1, BLOCK, BLOCK + 1, 151665, 151936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_edge_set(V, dtype):
    logits, targets = random(9, V, dtype=dtype, scale=4.0), random_targets(9, V)
    logits[1] = math.nan  # its target is -100: must not be read
    logits[2] = 0.5
    logits[3, targets[3] + 1 :] = -math.inf
    logits[4] -= 60.0
    logits.requires_grad_()
    ours = logprob_entropy(logits, targets, 0.7, check=True)
    (g,) = torch.autograd.grad(ours[0].sum() - 0.5 * ours[1].sum(), logits)
    wide = logits.detach().double().requires_grad_()
    exact = logprob_entropy_reference(wide, targets, 0.7)
    (g_exact,) = torch.autograd.grad(exact[0].sum() - 0.5 * exact[1].sum(), wide)
    atol = 1e-11 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close([o.double() for o in ours], list(exact), rtol=1e-6, atol=atol)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(g.double(), g_exact, rtol=rounding, atol=atol)
    assert (g[1] == 0).all()
    assert ours[1][2].item() == pytest.approx(math.log(V), abs=1e-5)


@pytest.mark.parametrize("N", [0, 1, 127, 8191])
def test_rows_strides_and_alignment(N):
    V = 1003
    wide, targets = random(N, 2 * V, dtype=torch.bfloat16, scale=4.0), random_targets(N + 1, V)[1:]  # unaligned int64
    for logits in (wide[:, :V], wide[:, ::2], wide[:, :V].t().contiguous().t()):
        exact = logprob_entropy_reference(logits.double(), targets)
        for y in (targets, targets.int()):
            logits = logits.detach().requires_grad_()
            ours = logprob_entropy(logits, y)
            torch.testing.assert_close([o.double() for o in ours], list(exact), rtol=0, atol=2e-5)
            (ours[0].sum() + ours[1].sum()).backward()  # stride-0 upstream gradients
            assert logits.grad.isfinite().all()


def test_inplace_backward_and_permutation():
    logits, targets = random(60, 1003, dtype=torch.bfloat16, scale=4.0), random_targets(60, 1003)
    grads = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        logp, entropy = logprob_entropy(leaf * 1.0, targets, inplace_backward=inplace)
        (logp + entropy).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    assert (grads[0].float().sum(1).abs() <= 1e-2 * grads[0].float().abs().sum(1) + 1e-6).all()
    order = torch.randperm(60, device="cuda")
    assert torch.equal(logprob_entropy(logits[order], targets[order])[0], logp[order])


def test_errors_against_float64_and_past_int32():
    checks = correctness(torch.device("cuda"))
    assert len(checks) == 5 and [check for check in checks if not check["ok"]] == []


@pytest.mark.parametrize("hidden_dtype,head_dtype", [(torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.float64,) * 2])
@pytest.mark.parametrize("temperature", [0.01, 0.9])
def test_policy_loss_equals_autograd_on_whole_logits(hidden_dtype, head_dtype, temperature):
    N, H, V = 300, 64, 1003
    hidden, weight = (
        random(N, H, dtype=hidden_dtype).requires_grad_(),
        random(V, H, dtype=head_dtype, scale=0.3, seed=1),
    )
    targets = random_targets(N, V)
    logp, _ = linear_logprob_entropy_reference(hidden.detach().double(), weight.double(), targets, temperature)
    arguments = {
        "token_weight": torch.rand(N, device="cuda"),
        "advantage": random(N, seed=2),
        "old_logp": logp + 0.2 * random(N, seed=3),
        "ref_logp": logp + 0.2 * random(N, seed=4),
        "entropy_coef": 0.01,
        "kl_coef": 0.1,
        "temperature": temperature,
    }
    with torch.autocast("cuda", dtype=torch.float16):
        loss, stats = linear_policy_loss(hidden, weight, targets, **arguments)
    wide = hidden.detach().double().requires_grad_()
    exact = linear_policy_loss_reference(wide, weight.double(), targets, **arguments)
    (g,), (g_exact,) = torch.autograd.grad(loss, hidden), torch.autograd.grad(exact, wide)
    assert abs(loss.item() - exact.item()) <= 1e-3 * abs(exact.item())
    assert (g.double() - g_exact).norm() <= 5e-3 * g_exact.norm()
    assert (g[1] == 0).all() and stats["ratio"][1] == 0


def test_no_grad_and_gradient_passes_agree_bitwise_in_bf16():
    N, H, V = 2000, 256, 151936
    hidden, weight = random(N, H, dtype=torch.bfloat16).requires_grad_(), random(V, H, dtype=torch.bfloat16, scale=0.3)
    targets = random_targets(N, V)
    with torch.no_grad():
        old, entropy = linear_logprob_entropy(hidden, weight, targets, 0.9)
    options = {"token_weight": 1 / N, "advantage": 1.0, "temperature": 0.9}
    loss, stats = linear_policy_loss(hidden, weight, targets, old_logp=old, **options)
    generic = linear_logprob_entropy(hidden, weight, targets, 0.9)
    assert torch.equal(stats["logp"], old) and torch.equal(generic[0], old) and torch.equal(generic[1], entropy)
    assert (stats["ratio"][targets != -100] == 1).all()
    (g,) = torch.autograd.grad(loss, hidden)
    (g_generic,) = torch.autograd.grad(-generic[0].sum() / N, hidden)
    assert (g.float() - g_generic.float()).norm() <= 2e-2 * g.float().norm()


def test_garbage_in_ignored_rows_has_no_effect():
    N, H, V = 200, 64, 1003
    weight, targets = random(V, H, dtype=torch.bfloat16), random_targets(N, V)
    results = []
    for garbage in (0.0, math.nan):
        hidden, advantage = random(N, H, dtype=torch.bfloat16), random(N, seed=1)
        hidden[1], advantage[1] = garbage, garbage
        loss, stats = linear_policy_loss(
            hidden.requires_grad_(), weight, targets, token_weight=1.0, advantage=advantage, old_logp=-5.0
        )
        results.append((loss, *stats.values(), torch.autograd.grad(loss, hidden)[0]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_extra_memory_does_not_grow_with_tokens():
    H, V = 512, 151936
    weight, extra = random(V, H, dtype=torch.bfloat16, scale=0.1), []
    for N in (2048, 8192):
        hidden, targets = random(N, H, dtype=torch.bfloat16).requires_grad_(), random_targets(N, V)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss, _ = linear_policy_loss(hidden, weight, targets, token_weight=1 / N, advantage=1.0, old_logp=-8.0)
        loss.backward()
        extra.append(torch.cuda.max_memory_allocated() - before - 2 * 2 * N * H)
    assert max(extra) <= 1.2e9 and extra[1] - extra[0] <= 16 * 2**20


def test_values_are_checked_on_request():
    hidden, weight = random(3, 8), random(5, 8)
    bad = torch.tensor([0, 5, 1], device="cuda")
    with pytest.raises(ValueError, match=r"targets\[1\] = 5 "):
        linear_logprob_entropy(hidden, weight, bad, check=True)
    assert linear_logprob_entropy(hidden, weight, bad)[0].isnan().tolist() == [False, True, False]


def test_compiled_model_agrees():
    layer, weight = torch.nn.Linear(64, 64).cuda(), random(1003, 64, scale=0.3)
    x, targets = random(50, 64), random_targets(50, 1003)

    def step(x):
        return linear_policy_loss(layer(x), weight, targets, token_weight=0.1, advantage=1.0, old_logp=-7.0)[0]

    expected = torch.autograd.grad(step(x), layer.weight)[0]
    compiled = torch.autograd.grad(torch.compile(step)(x), layer.weight)[0]
    torch.testing.assert_close(compiled, expected, rtol=1e-3, atol=1e-5)
