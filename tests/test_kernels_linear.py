"""kernels.linear_logprob_entropy: chunk loop with torch twins and with the Triton source against whole logits.

Run: pytest tests/test_kernels_linear.py
"""

import math
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from kernels import linear_logprob_entropy
from kernels.checks import check_lm_head
from kernels.linear_logprob_entropy import (
    _LinearLogprobEntropy,
    chunk_rows,
    head_input_gradient,
    head_logits,
    linear_logprob_entropy_reference,
)

TRITON = pytest.param(
    True, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA: test_kernels_gpu"), id="triton"
)
BOTH = pytest.mark.parametrize("triton", [pytest.param(False, id="torch"), TRITON])


def case(N, V, H=12, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, V, (N,), generator=generator)
    if N:
        targets[-1] = V - 1
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), targets


def run(hidden, weight, targets, temperature=1.0, triton=False, chunk=None):
    return _LinearLogprobEntropy.apply(hidden, weight, targets, temperature, triton, chunk)


@BOTH
@pytest.mark.parametrize("N,V", [(0, 50), (1, 1), (5, 2), (127, 61), (9, 4095), (9, 4097)])
def test_matches_whole_logits(triton, N, V):
    hidden, weight, targets = case(N, V)
    upstream = torch.randn(2, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    reference = linear_logprob_entropy_reference(hidden, weight, targets, 0.7)
    for out in (run(hidden, weight, targets, 0.7, triton, 40), reference):
        results.append((*out, *torch.autograd.grad(out, hidden, list(upstream))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)


@BOTH
def test_gradcheck(triton):
    hidden, weight, targets = case(N=3, V=4099, H=2)  # two blocks of the kernel, the second with 3 columns
    assert torch.autograd.gradcheck(lambda h: run(h, weight, targets, 1.3, triton, 2), (hidden,), eps=1e-6, atol=1e-6)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_not_rounded_on_the_way(triton, dtype):
    """fp32 sums from bf16 inputs: error against float64 from the same inputs far below that of bf16 logits."""
    hidden, weight, targets = case(N=20, V=1003, H=64, dtype=dtype)
    exact = linear_logprob_entropy_reference(hidden.double(), weight.double(), targets)
    ours = run(hidden, weight, targets, 1.0, triton)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    (gradient,) = torch.autograd.grad(ours[0].sum() - 0.1 * ours[1].sum(), hidden)
    (expected,) = torch.autograd.grad(exact[0].sum() - 0.1 * exact[1].sum(), hidden)
    assert gradient.dtype == dtype
    error = max((a.double() - b).abs().max().item() for a, b in zip(ours, exact))
    assert error <= 2e-5
    assert (gradient - expected).norm() <= (3e-3 if dtype == torch.bfloat16 else 1e-6) * expected.norm()
    if dtype == torch.bfloat16:
        eager = torch.log_softmax((hidden @ weight.t()).float(), -1).gather(1, targets[:, None])[:, 0]
        assert error <= 0.1 * (eager.double() - exact[0]).abs().max().item()


@BOTH
def test_gradient_and_no_grad_passes_agree_bitwise_and_chunks_do_not_matter(triton):
    hidden, weight, targets = case(N=40, V=700, H=32, dtype=torch.float32)
    with torch.no_grad():
        without = run(hidden, weight, targets, 0.9, triton)
    with_gradient = run(hidden, weight, targets, 0.9, triton)
    assert torch.equal(without[0], with_gradient[0]) and torch.equal(without[1], with_gradient[1])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    for other in (
        run(hidden, weight, targets, 0.9, triton, 1),
        run(hidden, weight, targets, 0.9, triton, 13),
        [out[order.argsort()] for out in run(hidden[order], weight, targets[order], 0.9, triton)],
    ):
        torch.testing.assert_close(list(other), list(without), rtol=1e-5, atol=1e-5)


def test_ignored_rows_give_zero_whatever_they_hold():
    hidden, weight, targets = case(N=12, V=40)
    targets[[0, 5, 11]] = -100
    clean = hidden.detach().clone().requires_grad_()
    garbage = hidden.detach().clone()
    garbage[[0, 5]] = torch.tensor([math.nan, math.inf], dtype=torch.float64)[:, None]
    garbage.requires_grad_()
    kept = targets != -100
    results = []
    for h in (clean, garbage):
        logp, entropy = linear_logprob_entropy(h, weight, targets)
        (logp.sum() - entropy.sum()).backward()
        results.append((logp, entropy, h.grad))
    for a, b in zip(*results):
        assert torch.equal(a, b) and (a[~kept] == 0).all()
    expected = linear_logprob_entropy_reference(clean[kept], weight, targets[kept])
    torch.testing.assert_close([r[kept] for r in results[0][:2]], list(expected))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA: test_kernels_gpu")
def test_kernels_skip_ignored_rows():
    """On CUDA no compaction happens inside: the kernels themselves leave such rows out."""
    hidden, weight, targets = case(N=6, V=40)
    targets[2] = -100
    hidden.data[2] = math.nan
    logp, entropy = run(hidden, weight, targets, triton=True)
    (logp + entropy).sum().backward()
    assert logp[2] == entropy[2] == 0 and (hidden.grad[2] == 0).all() and hidden.grad.isfinite().all()


def test_all_rows_ignored_and_no_rows():
    hidden, weight, targets = case(N=4, V=40)
    for h, y in ((hidden, torch.full((4,), -100)), (hidden[:0], targets[:0])):
        logp, entropy = linear_logprob_entropy(h, weight, y)
        (gradient,) = torch.autograd.grad(logp.sum() + entropy.sum(), hidden)
        assert logp.shape == entropy.shape == y.shape and (gradient == 0).all()


def test_non_contiguous_hidden_int32_targets_and_autocast():
    hidden, weight, targets = case(N=10, V=40, dtype=torch.float32)
    wide = torch.randn(10, 24).index_copy(1, torch.arange(0, 24, 2), hidden.detach())
    expected = linear_logprob_entropy(hidden, weight, targets)
    strided = linear_logprob_entropy(wide[:, ::2], weight, torch.stack([targets, targets], 1).int()[:, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = linear_logprob_entropy(hidden, weight, targets)
    for a, b, c in zip(expected, strided, autocast):
        torch.testing.assert_close(a, b)
        assert torch.equal(a, c)


def test_mixed_dtypes_follow_the_wider():
    hidden, weight, targets = case(N=10, V=40)
    expected = linear_logprob_entropy_reference(hidden.bfloat16().double(), weight, targets)
    logp, entropy = linear_logprob_entropy(hidden.bfloat16(), weight, targets)
    torch.testing.assert_close((logp, entropy), expected, rtol=1e-9, atol=1e-10)
    assert linear_logprob_entropy(hidden.bfloat16(), weight.float(), targets)[0].dtype == torch.float32


def test_upcast_slices_cover_the_vocabulary(monkeypatch):
    module = sys.modules["kernels.linear_logprob_entropy"]
    hidden, weight, targets = case(N=10, V=41, dtype=torch.bfloat16)
    whole = linear_logprob_entropy(hidden, weight, targets)
    monkeypatch.setattr(module, "UPCAST_ELEMENTS", 12 * 8)  # 8 rows of W at a time, the last slice with one
    torch.testing.assert_close(linear_logprob_entropy(hidden, weight, targets), whole)


def test_cuda_gemms_are_called_with_accepted_arguments():
    """Shapes and dtypes of the CUDA branch, on fake tensors: fp32 logits, gradient in the dtype of hidden or fp32."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        bf16, fp32 = torch.bfloat16, torch.float32
        for hidden_dtype, head_dtype in ((bf16, bf16), (fp32, bf16), (fp32, fp32)):
            hidden = torch.empty(6, 8, device="cuda", dtype=hidden_dtype)
            weight = torch.empty(40, 8, device="cuda", dtype=head_dtype)
            logits = head_logits(hidden, weight, torch.empty(6, 40, device="cuda"))
            gradient = head_input_gradient(logits.to(head_dtype), weight, hidden_dtype)
            assert logits.shape == (6, 40) and logits.dtype == torch.float32
            assert gradient.shape == (6, 8) and gradient.dtype == hidden_dtype


def test_chunks_bound_the_memory():
    for vocab in (1, 1500, 128256, 151936, 152064):
        rows = chunk_rows(vocab, torch.device("cuda"))
        assert rows % 128 == 0 and (rows == 128 or 6 * rows * vocab <= 2**30)
        assert chunk_rows(vocab, torch.device("cpu")) * vocab <= max(2**20, 64 * vocab)


def test_refusals():
    hidden, weight, targets = case(N=3, V=5)
    with pytest.raises(ValueError, match="frozen lm_head only"):
        linear_logprob_entropy(hidden, weight.clone().requires_grad_(), targets)
    with pytest.raises(ValueError, match=r"hidden \(N, H\) and weight \(V, H\) expected, got \(3, 12\), \(5, 11\)"):
        linear_logprob_entropy(hidden, weight[:, 1:], targets)
    with pytest.raises(ValueError, match="floating point, got torch.float64 and torch.uint8"):
        linear_logprob_entropy(hidden, weight.to(torch.uint8), targets)
    with pytest.raises(ValueError, match=r"targets\[1\] = 5 "):
        linear_logprob_entropy(hidden, weight, torch.tensor([0, 5, 1]))
    with pytest.raises(ValueError, match="temperature must be a finite float above 0, got 0.0"):
        linear_logprob_entropy(hidden, weight, targets, 0.0)


def test_fp32_head_under_a_bf16_decoder_is_refused_on_cuda():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(ValueError, match="lm_head is float32 under a torch.bfloat16 decoder"):
        hidden = torch.empty(3, 4, device="cuda", dtype=torch.bfloat16)
        linear_logprob_entropy(hidden, torch.empty(5, 4, device="cuda"), torch.zeros(3, device="cuda").long())


def test_lm_head_refusals():
    class Config:
        final_logit_softcapping = None
        logit_scale = 1.0

    head = torch.nn.Linear(4, 5, bias=False).requires_grad_(False)
    assert check_lm_head(head, Config()) is head.weight
    Config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="config.final_logit_softcapping = 30.0"):
        check_lm_head(head, Config())
    with pytest.raises(ValueError, match="config.logit_scale = 0.5"):  # a multimodal class has it one level down
        check_lm_head(head, SimpleNamespace(text_config=SimpleNamespace(logit_scale=0.5)))
    with pytest.raises(ValueError, match="requires_grad"):
        check_lm_head(torch.nn.Linear(4, 5, bias=False))
    with pytest.raises(ValueError, match="bias"):
        check_lm_head(torch.nn.Linear(4, 5).requires_grad_(False))
    adapter = torch.nn.Module()
    adapter.base_layer = head
    with pytest.raises(ValueError, match="adapter on lm_head"):
        check_lm_head(adapter)
    quantised = torch.nn.Module()
    quantised.weight = torch.nn.Parameter(torch.zeros(5, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        check_lm_head(quantised)


@pytest.mark.skipif(sys.platform != "linux", reason="peak resident memory is read in Linux units")
def test_peak_memory_stays_below_the_whole_logits():
    """N = 4096, V = 151936, H = 64 forward and backward in under 700 MB; the fp32 logits alone are 2.5 GB."""
    script = """
        import resource, torch
        from kernels import linear_policy_loss
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        torch.manual_seed(0)
        N, V, H = 4096, 151936, 64
        hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H) * 0.3
        targets = torch.randint(0, V, (N,))
        options = {"advantage": 1.0, "old_logp": -8.0, "entropy_coef": 0.01}
        before = peak()
        loss, stats = linear_policy_loss(hidden, weight, targets, token_weight=1 / N, **options)
        loss.backward()
        assert hidden.grad.isfinite().all()
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 700
