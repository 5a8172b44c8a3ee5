"""kernels.linear_policy_loss: value, gradient and statistics against plain autograd on whole logits.

Run: pytest tests/test_kernels_policy.py
"""

import math
import sys

import pytest
import torch

from kernels import linear_logprob_entropy, linear_policy_loss
from kernels.policy_loss import _LinearPolicyLoss, linear_policy_loss_reference, policy_arguments

N, H, V = 40, 12, 61
OPTIONS = {
    "plain": {},
    "asymmetric clip": {"clip_low": 0.1, "clip_high": 0.28},
    "dual clip": {"dual_clip": 1.3},
    "kl": {"kl_coef": 0.04},
    "entropy": {"entropy_coef": 0.02},
    "entropy per token": {"entropy_coef": "tensor"},
    "all": {"clip_low": 0.1, "clip_high": 0.3, "kl_coef": 0.1, "entropy_coef": "tensor", "temperature": 0.7},
    "all, dual clip": {"clip_high": 0.3, "kl_coef": 0.1, "entropy_coef": "tensor", "dual_clip": 1.35},
}


def case(dtype=torch.float64, temperature=1.0):
    """Inputs with ratios inside and outside the clip range, both signs and zeros of the advantage, and a -100 row."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = random(N, H), random(V, H) * 0.4
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[5], targets[-1] = -100, V - 1
    logp = torch.log_softmax(hidden @ weight.t() / temperature, -1).gather(1, targets.clamp_min(0)[:, None])[:, 0]
    tokens = {
        "token_weight": random(N).abs() / N,
        "advantage": random(N).round(decimals=1),
        "old_logp": logp + 0.3 * random(N),
        "ref_logp": logp + 0.3 * random(N),
    }
    tokens["advantage"][::7] = 0.0
    tokens["token_weight"][3] = 0.0
    tokens = {name: value.to(dtype) for name, value in tokens.items()}
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), targets, tokens, random(N).abs() * 0.05


def plain_loss(hidden, weight, targets, t, entropy_coef, kl_coef, clip_low, clip_high, temperature, dual_clip):
    """The formulas of the module once more, by autograd on whole logits, row by row selected with a mask."""
    log_p = torch.log_softmax(hidden @ weight.t() / temperature, -1)
    kept = targets != -100
    logp = log_p.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    ratio = (logp - t["old_logp"]).exp()
    surrogate = torch.min(ratio * t["advantage"], ratio.clip(1 - clip_low, 1 + clip_high) * t["advantage"])
    if dual_clip:  # row by row, as the paper words it: a bad token's surrogate is not below C A
        rows = [torch.max(s, dual_clip * a) if a < 0 else s for s, a in zip(surrogate, t["advantage"])]
        surrogate = torch.stack(rows)
    kl = (t["ref_logp"] - logp).exp() - (t["ref_logp"] - logp) - 1
    loss = t["token_weight"] * (-surrogate + kl_coef * kl - entropy_coef * entropy)
    return loss[kept].sum(), logp, entropy, ratio, kl


def interpreted_loss(hidden, weight, targets, **arguments):
    """The public function's computation with the Triton source, on CPU tensors."""
    temperature = arguments.pop("temperature", 1.0)
    defaults = {"ref_logp": None, "clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0, "entropy_coef": 0.0}
    arguments = policy_arguments(targets, hidden.dtype, **(defaults | arguments))
    loss, _, _, ratio, *_ = _LinearPolicyLoss.apply(hidden, weight, targets, temperature, arguments, True, True, 16)
    assert (ratio[targets == -100] == 0).all()
    return loss


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("path", ["torch", "triton", "reference"])
def test_equals_plain_autograd(name, path):
    if path == "triton" and torch.cuda.is_available():
        pytest.skip("with CUDA the kernels are compiled: test_kernels_gpu")
    hidden, weight, targets, tokens, entropy_coef = case(temperature=OPTIONS[name].get("temperature", 1.0))
    options = {"entropy_coef": 0.0, "kl_coef": 0.0, "clip_low": 0.2, "clip_high": 0.2, "temperature": 1.0}
    options["dual_clip"] = 0.0
    options |= OPTIONS[name]
    if options["entropy_coef"] == "tensor":
        options["entropy_coef"] = entropy_coef
    expected, logp, entropy, ratio, kl = plain_loss(hidden, weight, targets, tokens, **options)
    (expected_gradient,) = torch.autograd.grad(3 * expected, hidden)
    if path == "torch":
        loss, stats = linear_policy_loss(hidden, weight, targets, **tokens, **options)
        kept = targets != -100
        for key, value in (("logp", logp), ("entropy", entropy), ("ratio", ratio), ("kl", kl)):
            assert not stats[key].requires_grad and stats[key][5] == 0
            torch.testing.assert_close(stats[key][kept], value[kept].detach(), rtol=1e-9, atol=1e-10)
        counted = kept & (tokens["token_weight"] != 0)
        low = (tokens["advantage"] < 0) & (ratio < 1 - options["clip_low"]) & counted
        high = (tokens["advantage"] > 0) & (ratio > 1 + options["clip_high"]) & counted
        if options["dual_clip"]:
            dual = (tokens["advantage"] < 0) & (ratio > options["dual_clip"]) & counted
            assert dual.any() and not (dual & (low | high)).any()
            high |= dual
        assert low.any() and high.any()
        assert stats["clip_low_frac"].item() == pytest.approx(low.sum().item() / 38)
        assert stats["clip_high_frac"].item() == pytest.approx(high.sum().item() / 38)
    else:
        function = interpreted_loss if path == "triton" else linear_policy_loss_reference
        loss = function(hidden, weight, targets, **tokens, **options)
    (gradient,) = torch.autograd.grad(3 * loss, hidden)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


def test_hand_computed_token():
    """Logits ln 2 and 0, target 0: p = 2/3, H = 0.636514; r = (2/3)/(1/2) = 4/3 is clipped at 1.2 for A = 1 only."""
    hidden = torch.tensor([[math.log(2.0)]], dtype=torch.float64, requires_grad=True)
    weight, target = torch.tensor([[1.0], [0.0]], dtype=torch.float64), torch.tensor([0])
    common = {"token_weight": 0.5, "old_logp": math.log(0.5), "entropy_coef": 0.1}
    loss, stats = linear_policy_loss(hidden, weight, target, advantage=1.0, **common)
    assert loss.item() == pytest.approx(0.5 * (-1.2 - 0.1 * 0.636514), abs=1e-6)
    assert (stats["ratio"].item(), stats["clip_high_frac"].item()) == (pytest.approx(4 / 3), 1.0)
    (gradient,) = torch.autograd.grad(loss, hidden)  # the entropy term alone: dH/dz_0 = −p (ln p + H) = −0.154033
    assert gradient.item() == pytest.approx(-0.5 * 0.1 * -0.154033, abs=1e-6)
    loss, stats = linear_policy_loss(hidden, weight, target, advantage=-1.0, **common)
    assert loss.item() == pytest.approx(0.5 * (4 / 3 - 0.1 * 0.636514), abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, hidden)  # plus r dlogp/dz_0 = 4/3 (1 − 2/3)
    assert gradient.item() == pytest.approx(0.5 * (4 / 3 / 3 + 0.1 * 0.154033), abs=1e-6)


def test_dual_clip_by_hand():
    """r = 4/3 above C = 1.25: the surrogate of A = −2 is −2 · 1.25 instead of −2 · 4/3, without a gradient."""
    hidden = torch.tensor([[math.log(2.0)]], dtype=torch.float64, requires_grad=True)
    weight, target = torch.tensor([[1.0], [0.0]], dtype=torch.float64), torch.tensor([0])
    for advantage, C, expected, slope in ((-2.0, 1.25, 2.5, 0.0), (-2.0, 1.5, 8 / 3, 8 / 9), (2.0, 1.25, -2.4, 0.0)):
        arguments = {"token_weight": 1.0, "old_logp": math.log(0.5), "advantage": advantage, "dual_clip": C}
        loss, stats = linear_policy_loss(hidden, weight, target, **arguments)
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert loss.item() == pytest.approx(expected) and gradient.item() == pytest.approx(slope)
        assert stats["clip_high_frac"].item() == float(slope == 0)


def test_first_ratio_is_exactly_one():
    hidden, weight, targets, tokens, _ = case(dtype=torch.float32)
    with torch.no_grad():
        tokens["old_logp"], _ = linear_logprob_entropy(hidden, weight, targets, 0.9)
    _, stats = linear_policy_loss(hidden, weight, targets, **tokens, temperature=0.9)
    assert torch.equal(stats["logp"], tokens["old_logp"])
    assert (stats["ratio"][targets != -100] == 1).all()
    assert stats["clip_low_frac"] == stats["clip_high_frac"] == 0


def test_floats_equal_tensors():
    hidden, weight, targets, _, _ = case()
    floats = {"token_weight": 0.3, "advantage": -1.5, "old_logp": -4.0, "ref_logp": -4.1, "entropy_coef": 0.01}
    tensors = {name: torch.full((N,), value, dtype=torch.float64) for name, value in floats.items()}
    results = []
    for arguments in (floats, tensors):
        loss, stats = linear_policy_loss(hidden, weight, targets, **arguments, kl_coef=0.1)
        results.append((loss, *stats.values(), torch.autograd.grad(loss, hidden)[0]))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_micro_batches_add_up_and_order_does_not_matter():
    hidden, weight, targets, tokens, coef = case(dtype=torch.float32)
    options = {"kl_coef": 0.1, "entropy_coef": coef.float()}

    def gradient(rows):
        arguments = {k: v[rows] for k, v in (tokens | {"entropy_coef": options["entropy_coef"]}).items()}
        loss, _ = linear_policy_loss(hidden[rows], weight, targets[rows], **arguments, kl_coef=0.1)
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    whole = gradient(torch.arange(N))
    parts = [gradient(part) for part in torch.arange(N).split(13)]
    shuffled = gradient(torch.randperm(N, generator=torch.Generator().manual_seed(1)))
    for i in (0, 1):
        torch.testing.assert_close(sum(part[i] for part in parts), whole[i], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(shuffled[i], whole[i], rtol=1e-5, atol=1e-6)


def test_garbage_in_ignored_rows_has_no_effect():
    hidden, weight, targets, tokens, coef = case()
    results = []
    for garbage in (0.0, math.nan, math.inf):
        h = hidden.detach().clone()
        arguments = {k: v.clone() for k, v in (tokens | {"entropy_coef": coef}).items()}
        for tensor in (h, *arguments.values()):
            tensor[5] = garbage
        loss, stats = linear_policy_loss(h.requires_grad_(), weight, targets, **arguments, kl_coef=0.1)
        results.append((loss, *stats.values(), torch.autograd.grad(loss, h)[0]))
        if not torch.cuda.is_available():
            loss = interpreted_loss(h, weight, targets, **arguments, kl_coef=0.1)  # no compaction: as on CUDA
            results[-1] += (loss, torch.autograd.grad(loss, h)[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_rows_without_gradient_give_exact_zeros():
    hidden, weight, targets, tokens, _ = case()
    tokens["advantage"].zero_()
    tokens["advantage"][8] = 1.0
    tokens["old_logp"][8] = 0.0  # ratio < 1, so the token is active
    loss, _ = linear_policy_loss(hidden, weight, targets, **tokens)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.abs().sum(1).nonzero().tolist() == [[8]]


def test_no_tokens():
    hidden, weight, targets, tokens, _ = case()
    for h, y, rows in ((hidden, torch.full((N,), -100), slice(None)), (hidden[:0], targets[:0], slice(0))):
        loss, stats = linear_policy_loss(h, weight, y, **{k: v[rows] for k, v in tokens.items()}, kl_coef=0.1)
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert loss.item() == 0 and (gradient == 0).all()
        assert stats["logp"].shape == y.shape and stats["clip_low_frac"] == stats["clip_high_frac"] == 0


def test_far_drift_is_large_and_finite():
    hidden, weight, targets, tokens, _ = case(dtype=torch.float32)
    tokens["old_logp"] = tokens["old_logp"] - 200.0
    tokens["ref_logp"] = tokens["ref_logp"] + 200.0
    loss, stats = linear_policy_loss(hidden, weight, targets, **tokens, kl_coef=0.1)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.isfinite() and gradient.isfinite().all()
    assert stats["ratio"].max().item() == pytest.approx(math.exp(20), rel=1e-5)
    (expected,) = torch.autograd.grad(
        linear_policy_loss_reference(hidden, weight, targets, **tokens, kl_coef=0.1), hidden
    )
    assert (expected == 0).all() and torch.equal(gradient, expected)  # outside the clamp the loss is constant


def test_without_gradient_only_the_forward_runs(monkeypatch):
    hidden, weight, targets, tokens, _ = case()
    expected, stats = linear_policy_loss(hidden, weight, targets, **tokens)
    monkeypatch.setattr(sys.modules["kernels.linear_logprob_entropy"], "head_input_gradient", None)
    with torch.no_grad():
        loss, again = linear_policy_loss(hidden, weight, targets, **tokens)
    assert not loss.requires_grad and torch.equal(loss, expected.detach()) and torch.equal(again["logp"], stats["logp"])


def test_two_gemms_and_backward_can_run_twice(monkeypatch):
    hidden, weight, targets, tokens, _ = case()
    module, calls = sys.modules["kernels.linear_logprob_entropy"], []
    for name in ("head_logits", "head_input_gradient"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=function: calls.append(n) or f(*a))
    loss, _ = linear_policy_loss(hidden, weight, targets, **tokens)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    second = torch.autograd.grad(2 * loss, hidden)[0]
    assert calls == ["head_logits", "head_input_gradient"]
    torch.testing.assert_close(second, 2 * first)


def test_refusals():
    hidden, weight, targets, tokens, _ = case()
    with pytest.raises(ValueError, match=r"advantage must be a float or a \(40,\) tensor on cpu without gradient"):
        linear_policy_loss(hidden, weight, targets, **(tokens | {"advantage": tokens["advantage"][1:]}))
    with pytest.raises(ValueError, match="old_logp .* requires_grad=True"):
        linear_policy_loss(hidden, weight, targets, **(tokens | {"old_logp": torch.zeros(N, requires_grad=True)}))
    with pytest.raises(ValueError, match="kl_coef = 0.1 needs ref_logp"):
        linear_policy_loss(hidden, weight, targets, **(tokens | {"ref_logp": None}), kl_coef=0.1)
    with pytest.raises(ValueError, match="dual_clip = 1.2 must be 0 or above"):
        linear_policy_loss(hidden, weight, targets, **tokens, dual_clip=1.2)
    with pytest.raises(ValueError, match="frozen lm_head only"):
        linear_policy_loss(hidden, weight.clone().requires_grad_(), targets, **tokens)
    with pytest.raises(ValueError, match="temperature"):
        linear_policy_loss(hidden, weight, targets, **tokens, temperature=math.nan)
    with pytest.raises(ValueError, match=r"targets\[0\] = 61 "):
        linear_policy_loss(hidden, weight, targets.index_fill(0, torch.tensor([0]), V), **tokens)


def test_compiled_model_breaks_its_graph_and_agrees():
    hidden, weight, targets, tokens, _ = case(dtype=torch.float32)
    layer = torch.nn.Linear(H, H)

    def step(x):
        loss, stats = linear_policy_loss(torch.tanh(layer(x)), weight, targets, **tokens)
        return 2 * loss + stats["logp"].sum()

    expected = torch.autograd.grad(step(hidden), layer.weight)[0]
    compiled = torch.compile(step, backend="eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(hidden), layer.weight)[0], expected)
