"""kernels.logprob_entropy: Triton source under the interpreter and torch twins against float64 autograd.

Run: TRITON_INTERPRET is set by conftest.py;  pytest tests/test_kernels_logits.py
"""

import math

import pytest
import torch

from kernels import logprob_entropy
from kernels.logprob_entropy import (
    BLOCK,
    _LogprobEntropy,
    gradients_torch,
    logprob_entropy_reference,
    stats_torch,
    stats_triton,
)

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA: test_kernels_gpu")
BF16 = 2**-7  # relative error of a bf16 result: the interpreter truncates where a GPU rounds


def brute_force(logits, targets, temperature):
    """(logp, entropy) in float64, straight from the definitions; rows of -100 stay 0."""
    logits = logits.double() / temperature
    logp, entropy = torch.zeros(2, len(targets), dtype=torch.float64)
    for row, y in enumerate(targets.tolist()):
        if y != -100:
            p = logits[row].softmax(0)
            logp[row] = logits[row].log_softmax(0)[y]
            entropy[row] = -(p[p > 0] * p[p > 0].log()).sum()
    return logp, entropy


def exact_gradient(logits, targets, temperature, g_logp, g_entropy):
    """Gradient of Σ g_logp·logp + g_entropy·entropy from the formulas of the module, in float64."""
    log_p = (logits.double() / temperature).log_softmax(1)
    p, finite = log_p.exp(), log_p.clamp_min(-1e4)
    entropy = -(p * finite).sum(1, keepdim=True)
    kept = (targets != -100)[:, None]
    onehot = torch.zeros_like(p).scatter(1, targets.clamp_min(0).long()[:, None], 1.0)
    dz = g_logp.double()[:, None] * (onehot - p) - g_entropy.double()[:, None] * p * (finite + entropy)
    return torch.where(kept, dz / temperature, 0.0)


def case(V, N, dtype=torch.float32, scale=4.0, seed=0):
    """Random logits with the last id, a row of -100, equal, −inf and very negative logits among the rows."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(N, V, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, V, (N,), generator=generator)
    if N:
        targets[-1] = V - 1
    if N > 4:
        targets[1] = -100
        logits[1] = math.nan  # must not be read
        logits[2] = 0.5
        logits[3, targets[3] + 1 :] = -math.inf
        logits[4] -= 60.0  # far below any running maximum that starts at 0
    return logits.to(dtype), targets


@interpreted
@pytest.mark.parametrize("V,block", [(1, 16), (2, 16), (15, 16), (16, 16), (17, 16), (1000, 256), (1003, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kernels_match_the_definitions(V, block, dtype):
    logits, targets = case(V, N=9, dtype=dtype)
    logits.requires_grad_()
    logp, entropy = _LogprobEntropy.apply(logits, targets, 0.7, False, block)
    expected = brute_force(logits.detach(), targets, 0.7)
    assert logp.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-5}
    torch.testing.assert_close(logp.double(), expected[0], **tolerance)
    torch.testing.assert_close(entropy.double(), expected[1], **tolerance)
    g_logp, g_entropy = torch.randn(2, 9, dtype=logp.dtype, generator=torch.Generator().manual_seed(1))
    (dz,) = torch.autograd.grad((logp * g_logp + entropy * g_entropy).sum(), logits)
    expected = exact_gradient(logits.detach(), targets, 0.7, g_logp, g_entropy)
    assert dz.dtype == dtype
    limit = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: BF16 * expected.abs().max().item()}[dtype]
    assert (dz.double() - expected).abs().max() <= limit


@interpreted
@pytest.mark.parametrize("N", [0, 1, 127])
def test_number_of_rows(N):
    logits, targets = case(V=131, N=N)
    logp, entropy = _LogprobEntropy.apply(logits.requires_grad_(), targets, 1.0, False, 64)
    expected = brute_force(logits.detach(), targets, 1.0)
    torch.testing.assert_close(logp.double(), expected[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-6, atol=1e-5)
    (logp.sum() + entropy.sum()).backward()  # stride-0 upstream gradients
    ones = torch.ones(N)
    expected = exact_gradient(logits.detach(), targets, 1.0, ones, ones)
    torch.testing.assert_close(logits.grad.double(), expected, rtol=0, atol=2e-6)


@interpreted
def test_qwen_vocabulary_and_block_edges():
    for V in (BLOCK - 1, BLOCK, BLOCK + 1, 151936):
        logits, targets = case(V, N=3, dtype=torch.bfloat16)
        targets[0] = BLOCK - 2 if V > BLOCK else 0
        logp, entropy, _ = stats_triton(logits, targets, 0.9)
        expected = brute_force(logits, targets, 0.9)
        torch.testing.assert_close(logp.double(), expected[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(entropy.double(), expected[1], rtol=0, atol=2e-5)


@interpreted
@pytest.mark.parametrize("temperature,a,b", [(0.7, 1.0, 0.0), (1.0, 0.0, 1.0), (1.3, 3.0, -1.0)])
def test_gradcheck_through_the_triton_source(temperature, a, b):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 21, dtype=torch.float64, generator=generator, requires_grad=True)  # blocks of 8, 8 and 5
    targets = torch.tensor([0, 20, -100])

    def function(z):
        logp, entropy = _LogprobEntropy.apply(z, targets, temperature, False, 8)
        return a * logp + b * entropy

    assert torch.autograd.gradcheck(function, (logits,), eps=1e-6, atol=1e-6)


@interpreted
def test_non_contiguous_logits_and_gradients():
    wide, targets = case(V=200, N=9)
    columns = wide.t().contiguous().t()  # strides (1, N)
    sliced = torch.cat([wide, wide], 1)[:, 100:300].detach()  # what logits[:, :-1] style slicing gives
    upstream = torch.randn(9, 2, generator=torch.Generator().manual_seed(1))  # columns with stride 2
    for view in (columns, sliced):
        plain = view.contiguous().requires_grad_()
        view = view.requires_grad_()
        results = []
        for z in (plain, view):
            logp, entropy = _LogprobEntropy.apply(z, targets, 1.0, False, 64)
            results.append((logp, entropy, *torch.autograd.grad([logp, entropy], z, [upstream[:, 0], upstream[:, 1]])))
        assert not view.is_contiguous()
        for a, b in zip(*results):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@interpreted
def test_inplace_backward_reuses_the_logits_and_forbids_a_second_one():
    logits, targets = case(V=200, N=9)
    expected = logits.clone().requires_grad_()
    _LogprobEntropy.apply(expected, targets, 1.0, False, 64)[0].sum().backward()
    leaf = logits.clone().requires_grad_()
    work = leaf * 1.0
    logp, _ = _LogprobEntropy.apply(work, targets, 1.0, True, 64)
    logp.sum().backward(retain_graph=True)
    assert torch.equal(leaf.grad, expected.grad)
    assert torch.equal(work.detach(), expected.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()


@interpreted
def test_confident_rows_keep_their_digits():
    """H ≈ 5e-4 to 1 % and logp ≈ −3e-5 to 3 % in fp32, which lse − Σ p·z and z_y − lse lose.

    The reference sums as torch does: the lane that holds the 1 loses its share of the rest, an eighth under AVX2.
    """
    V = 1000
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(0)) * 0.5 + 20.0
    logits[:, 7] = 20.0 + torch.linspace(17.2, 18.0, 6)
    targets = torch.full((6,), 7)
    exact_logp, exact_entropy = brute_force(logits, targets, 1.0)
    assert 1e-4 < exact_entropy.min() < exact_entropy.max() < 2e-3 and exact_logp.max() > -4e-5
    scratch = torch.empty_like(logits)
    for tolerance, (logp, entropy, *_) in (
        (0.03, stats_triton(logits, targets, 1.0, 256)),
        (0.03, stats_torch(logits.clone(), targets, 1.0, scratch)),
        (0.15, logprob_entropy_reference(logits, targets)),
    ):
        assert ((entropy.double() - exact_entropy).abs() <= 0.01 * exact_entropy).all()
        assert ((logp.double() - exact_logp).abs() <= tolerance * exact_logp.abs()).all()


@interpreted
def test_invariants():
    logits, targets = case(V=1003, N=60, scale=8.0)
    logits[5:9, 1:] -= 80.0  # nearly certain rows
    logits[1] = 0.0
    logits.requires_grad_()
    logp, entropy = _LogprobEntropy.apply(logits, targets, 1.0, False, 256)
    assert (logp <= 0).all() and (entropy >= 0).all() and (entropy <= math.log(1003) + 1e-6).all()
    assert entropy[2].item() == pytest.approx(math.log(1003), abs=1e-6)  # equal logits
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    permuted = stats_triton(logits.detach()[order], targets[order], 1.0, 256)
    assert torch.equal(permuted[0], logp[order]) and torch.equal(permuted[1], entropy[order])
    (dz,) = torch.autograd.grad((logp + 0.3 * entropy).sum(), logits)
    assert (dz.sum(1).abs() <= 1e-5 * dz.abs().sum(1) + 1e-7).all()
    assert (dz[1] == 0).all()


@interpreted
def test_bad_values_are_visible():
    logits = torch.randn(3, 40)
    logits[0, 33] = math.nan
    logp, entropy, _ = stats_triton(logits, torch.tensor([3, 40, 39]), 1.0, 16)
    assert logp.isnan().tolist() == [True, True, False]  # a nan logit; an unchecked target outside [0, V)
    assert entropy.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("V", [1, 2, 1000, 1003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_reference_matches_the_definitions(V, dtype):
    logits, targets = case(V, N=9, dtype=dtype)
    logits.requires_grad_()
    logp, entropy = logprob_entropy(logits, targets.int(), 0.7)
    expected = brute_force(logits.detach(), targets, 0.7)
    torch.testing.assert_close(logp.double(), expected[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-6, atol=1e-5)
    (dz,) = torch.autograd.grad((logp - 2 * entropy).sum(), logits)
    ones = torch.ones(9)
    expected = exact_gradient(logits.detach(), targets, 0.7, ones, -2 * ones)
    assert (dz.double() - expected).abs().max() <= (BF16 * expected.abs().max() if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("g_entropy", [0.0, -0.5])
def test_torch_twins_match_the_definitions(g_entropy):
    logits, targets = case(V=1003, N=9, dtype=torch.float64)
    keep = torch.tensor([0, 2, 4, 5, 6, 7, 8])  # finite rows without -100: what the twins are for
    logits, targets = logits[keep], targets[keep]
    logp, entropy, state = stats_torch(logits.clone(), targets, 0.7, torch.empty_like(logits))
    torch.testing.assert_close((logp, entropy), brute_force(logits, targets, 0.7), rtol=1e-11, atol=1e-11)
    g_logp, g_entropy = torch.linspace(-1, 1, 7, dtype=torch.float64), torch.full((7,), g_entropy, dtype=torch.float64)
    dz = gradients_torch(state, targets, entropy, g_logp, g_entropy, 0.7)
    torch.testing.assert_close(dz, exact_gradient(logits, targets, 0.7, g_logp, g_entropy), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, torch.tensor(1.0)])
def test_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be a finite float above 0"):
        logprob_entropy(torch.randn(2, 5), torch.tensor([0, 1]), temperature)


@pytest.mark.parametrize(
    "targets,message",
    [
        (torch.tensor([0, 5, 1]), r"targets\[1\] = 5 is neither -100 nor inside \[0, 5\)"),
        (torch.tensor([0, 1, -1]), r"targets\[2\] = -1 "),
        (torch.tensor([0.0, 1.0, 2.0]), "int32 or int64"),
        (torch.tensor([0, 1]), r"shape \(3,\)"),
    ],
)
def test_targets_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        logprob_entropy(torch.randn(3, 5), targets)


def test_logits_are_refused():
    with pytest.raises(ValueError, match="floating point"):
        logprob_entropy(torch.ones(3, 5, dtype=torch.long), torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"\(N, V\)"):
        logprob_entropy(torch.randn(1, 3, 5), torch.tensor([0, 1, 2]))
