"""kernels.gemm_stats, the candidate with the statistics inside GEMM 1: Triton source interpreted, against whole logits.

Run: pytest tests/test_kernels_gemm.py
"""

import pytest
import torch

from bench.gemm_stats import run_head_fused
from kernels.linear_logprob_entropy import linear_logprob_entropy_reference

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA: test_kernels_gpu"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, on the row of nan that must have no effect
]
TILE = {"ROWS": 16, "COLUMNS": 32, "DEPTH": 16, "num_warps": 4, "num_stages": 2}


@pytest.mark.parametrize("N,V,H", [(20, 103, 24), (5, 1, 16), (33, 64, 16), (0, 40, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_matches_whole_logits(N, V, H, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(dtype)
    weight = (1.5 * torch.randn(V, H, generator=generator)).to(dtype)
    targets = torch.randint(0, V, (N,), generator=generator)
    if N:
        targets[-1], targets[1] = V - 1, -100
        hidden[1] = float("nan")
    wide = dtype == torch.float64
    g = torch.randn(2, N, generator=generator, dtype=torch.float64 if wide else torch.float32)
    h = hidden.double().requires_grad_()
    exact = linear_logprob_entropy_reference(h, weight.double(), targets, 0.8)
    (expected,) = torch.autograd.grad(exact, h, list(g.double()))

    def gradients(rows, _logp, _entropy):
        return g[0][rows], g[1][rows]

    logp, entropy, gradient = run_head_fused(hidden, weight, targets, 0.8, gradients, chunk=16, tile=TILE)
    torch.testing.assert_close([logp.double(), entropy.double()], list(exact), rtol=0, atol=1e-12 if wide else 2e-5)
    if wide:
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    else:  # the interpreter truncates to bf16 where a GPU rounds
        assert (gradient.double() - expected).norm() <= 1e-2 * expected.norm() + 1e-6
    without = run_head_fused(hidden, weight, targets, 0.8, None, chunk=16, tile=TILE)
    assert torch.equal(without[0], logp) and torch.equal(without[1], entropy) and without[2] is None


def test_a_target_outside_the_vocabulary_is_visible():
    hidden, weight = torch.randn(3, 16), torch.randn(40, 16)
    logp, *_ = run_head_fused(hidden, weight, torch.tensor([0, 40, 39]), 1.0, None, tile=TILE)
    assert logp.isnan().tolist() == [False, True, False]
