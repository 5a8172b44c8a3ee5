"""train_rl.py and train_sft.py on a random two-layer model: gradients, exact resume, batch arithmetic, bad input.

    python -m pytest tests/test_train.py
"""

import dataclasses
import datetime
import gzip
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import byte_tokenizer, family_tokenizer

import rollout
import train_rl
import train_sft
from core import conversation, run
from core.args import RunArgs, cli, parse_args
from core.conversation import turn_end
from core.model import add_reference, collate, hidden_of_targets, load_policy, packed, token_stats, use_reference
from core.run import question_indices
from core.trajectory import DataError
from data.questions import load_questions, question_of
from data.world.tokenizer import build_tokenizer
from engines.args import SamplingArgs
from engines.turns import start_draft
from grpo import metrics, rewards
from grpo.advantages import token_weights

ROOT = Path(__file__).parent.parent


def low_ids(group, correctness, formed, a):
    """A reward that random models earn unequally and can learn: low token ids."""
    return [{"total": -sum(t.token_ids[t.prompt_len :]) / 2000, "correct": 0.0} for t in group]


@pytest.fixture
def questions_file(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"id": f"q{i}", "question": f"{i}?", "answer": "1"}) + "\n" for i in range(7)))
    return path


@pytest.fixture
def flags(tiny_model, questions_file, tmp_path, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "correct", low_ids)
    return dict(
        model_name_or_path=str(tiny_model),
        data=str(questions_file),
        output_dir=str(tmp_path / "run"),
        num_generations=4,
        questions_per_step=2,
        max_completion_length=16,
        per_device_train_batch_size=3,
        max_steps=4,
        save_steps=2,
        threads=1,
        lora_r=4,
        max_grad_norm=1e9,  # gradients as they are
    )


def scored_step(args):
    """(model, micro-batches) after rollout, score, reward and advantage of one step."""
    torch.manual_seed(0)
    model, tokenizer = load_policy(args)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    if args.beta > 0:
        add_reference(model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B.default" in name:
                    p.add_(0.02)
    questions = load_questions(args.data)[: args.questions_per_step]
    trajectories = rollout.rollout(model, tokenizer, questions, args, {}, (0, 0))
    model.train()
    parts = [
        train_rl.micro_batches(p, model, tokenizer.pad_token_id, args)
        for p in train_rl.split(trajectories, args.updates_per_batch)
    ]
    for k, t in enumerate(trajectories):
        t.rewards = {"total": float(k % 3)}
        t.advantage = [(k % 5 - 2.0) * m for m in t.loss_mask]
    return model, parts


def gradients(model):
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return grads


class NoStep(torch.optim.SGD):
    """Keeps the gradients for the test instead of stepping."""

    def step(self):
        pass

    def zero_grad(self):
        pass


def step(model, optimizer, part, args):
    """One update of one process, with the constant entropy coefficient."""
    everyone = [t for mb in part for t in mb.trajectories]
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return train_rl.update(model, optimizer, scheduler, part, everyone, [args.entropy_coef] * len(everyone), args)


def gradient_of_update(model, part, args):
    optimizer = NoStep([p for p in model.parameters() if p.requires_grad], lr=1.0)
    stats = step(model, optimizer, part, args)
    return gradients(model), stats


def plain_loss(model, part, args):
    """The same loss by autograd on whole logits, per trajectory, from the formulas of PAPERS A4."""
    rows = [t for mb in part for t in mb.trajectories]
    weights = token_weights([t.completion_tokens for t in rows], args.loss_type, args.max_completion_length)
    total, old = 0.0, {}
    for mb in part:
        sizes = [t.completion_tokens for t in mb.trajectories]
        old |= {(t.question_id, t.sample_idx): v for t, v in zip(mb.trajectories, mb.old_logp.split(sizes))}
    for t, w in zip(rows, weights):
        ids = torch.tensor([t.token_ids])
        logps = (model(ids).logits[0] / args.temperature).log_softmax(-1)[:-1]
        logp = logps.gather(1, ids[0, 1:, None])[:, 0]
        entropy = -(logps.exp() * logps).sum(-1)[torch.tensor(t.loss_mask[1:], dtype=torch.bool)].mean()
        total = total - args.entropy_coef * entropy / len(rows)
        if args.beta > 0:
            with use_reference(model):
                ref = (model(ids).logits[0] / args.temperature).log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        trained = [i for i, mask in enumerate(t.loss_mask) if mask]
        for i, before in zip(trained, old[t.question_id, t.sample_idx], strict=True):
            ratio = (logp[i - 1] - before).exp()
            clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon_high)
            loss = -torch.minimum(ratio * t.advantage[i], clipped * t.advantage[i])
            if args.dual_clip and t.advantage[i] < 0:
                loss = torch.minimum(loss, torch.tensor(-args.dual_clip * t.advantage[i]))
            if args.beta > 0:
                drift = ref[i - 1] - logp[i - 1]
                loss = loss + args.beta * (drift.exp() - drift - 1)
            total = total + w * loss
    return total


def close(a, b, tolerance):
    difference = sum((a[n] - b[n]).pow(2).sum() for n in a) ** 0.5
    return difference <= tolerance * sum(b[n].pow(2).sum() for n in b) ** 0.5


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize(
    "beta, entropy_coef, dual_clip", [(0.0, 0.0, 0.0), (0.1, 0.0, 0.0), (0.1, 0.05, 0.0), (0.0, 0.05, 1.25)]
)
def test_gradients_equal_plain_autograd_on_whole_logits(flags, loss_type, beta, entropy_coef, dual_clip):
    bonus = dict(entropy_regulariser="constant", entropy_coef=entropy_coef) if entropy_coef else {}
    args = train_rl.Args(**flags, **bonus, loss_type=loss_type, beta=beta, temperature=0.8, dual_clip=dual_clip)
    model, (part,) = scored_step(args)
    with torch.no_grad():  # move off the sampling policy, so that ratios differ from 1 and some are clipped
        for name, p in model.named_parameters():
            if "lora_B.default" in name:
                p.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    fused, stats = gradient_of_update(model, part, args)
    loss = plain_loss(model, part, args)
    loss.backward()
    assert close(fused, gradients(model), 1e-5)
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert stats["clip_ratio/low_mean"] + stats["clip_ratio/high_mean"] > 0


def test_clip_ratio_counts_tokens_that_are_trained_on(flags):
    args = train_rl.Args(**flags, mask_truncated_completions=True)
    model, (part,) = scored_step(args)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B.default" in name:
                p.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    rows = [t for mb in part for t in mb.trajectories]
    for k, t in enumerate(rows):
        t.finish = ("eos", "length")[k % 2]
    clipped = 0
    for mb in part:
        _, stats = train_rl.policy_loss(model, mb, [(0.1, 0.0)] * len(mb.trajectories), args)
        token = iter(stats["ratio"].tolist())
        for t in mb.trajectories:
            advantages = [(a, next(token)) for a, m in zip(t.advantage, t.loss_mask) if m]
            clipped += sum(a > 0 and r > 1.2 for a, r in advantages) * (t.finish == "eos")
    _, stats = gradient_of_update(model, part, args)
    assert clipped and stats["clip_ratio/high_mean"] == pytest.approx(clipped / sum(t.completion_tokens for t in rows))


def test_rewards_are_given_by_the_format_that_is_asked_for(flags, monkeypatch):
    asked = []
    monkeypatch.setattr(train_rl, "grade", lambda t, form: asked.append(form) or (0.0, True))
    train_rl.main(train_rl.Args(**flags | {"max_steps": 1}, format="strict"))
    assert asked == ["strict"] * 8


def test_the_first_ratio_of_a_step_is_exactly_one(flags):
    args = train_rl.Args(**flags)
    model, (part,) = scored_step(args)
    for mb in part:
        _, stats = train_rl.policy_loss(model, mb, [(0.1, 0.0)] * len(mb.trajectories), args)
        assert stats["ratio"].unique().tolist() == [1.0]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_micro_batches_add_up_to_the_whole_batch(flags, loss_type):
    results = []
    for size in (1, 3, 8):
        args = train_rl.Args(**flags | {"per_device_train_batch_size": size}, loss_type=loss_type)
        model, (part,) = scored_step(args)
        results.append(gradient_of_update(model, part, args)[0])
    assert close(results[0], results[2], 1e-5) and close(results[1], results[2], 1e-5)


def test_a_token_budget_packs_by_length(flags):
    """Rows × longest within the budget, nothing lost, and the same gradient as by number."""
    args = train_rl.Args(**flags | {"max_prompt_length": 510}, max_tokens_per_micro_batch=1600)
    model, (part,) = scored_step(args)
    sizes = [(len(mb.trajectories), mb.batch.input_ids.shape[1]) for mb in part]
    assert len(sizes) > 1 and sum(rows for rows, _ in sizes) == 8
    assert all(rows * longest <= 1600 for rows, longest in sizes)
    assert [longest for _, longest in sizes] == sorted(longest for _, longest in sizes)
    by_number = train_rl.Args(**flags)
    budget, _ = gradient_of_update(model, part, args)
    model, (part,) = scored_step(by_number)
    assert close(budget, gradient_of_update(model, part, by_number)[0], 1e-5)


def test_packing_fills_the_budget_and_lets_a_long_row_alone():
    def row(n):
        return type("T", (), {"token_ids": [0] * n})()

    cuts = [[len(t.token_ids) for t in rows] for rows in packed([row(n) for n in (9, 2, 3, 30, 4, 5)], 1, 12)]
    assert cuts == [[2, 3, 4], [5], [9], [30]]
    cuts = [[len(t.token_ids) for t in rows] for rows in packed([row(n) for n in (5, 1, 3)], 2, 0)]
    assert cuts == [[1, 3], [5]]


def test_micro_batches_without_a_gradient_are_not_run(flags, monkeypatch):
    args = train_rl.Args(**flags)
    model, (part,) = scored_step(args)
    for t in part[0].trajectories:
        t.advantage = [0.0] * len(t.token_ids)
    whole, _ = gradient_of_update(model, part, args)
    ran, real = [], train_rl.policy_loss
    monkeypatch.setattr(train_rl, "policy_loss", lambda m, mb, *rest: ran.append(mb) or real(m, mb, *rest))
    assert close(gradient_of_update(model, part, args)[0], whole, 1e-12) and len(ran) == len(part) - 1
    args.entropy_coef = 0.1  # now they have one
    gradient_of_update(model, part, args)
    assert len(ran) == 2 * len(part) - 1


def test_tool_text_has_no_gradient_of_its_own(flags):
    """Hidden states that predict masked tokens never reach the head."""
    args = train_rl.Args(**flags)
    model, (part,) = scored_step(args)
    t = part[0].trajectories[0]
    t.loss_mask = [0] * len(t.token_ids)
    t.loss_mask[-1] = 1
    batch = collate([t], 0, torch.device("cpu"))
    hidden, targets = hidden_of_targets(model, batch)
    assert hidden.shape[0] == 1 and targets.tolist() == [t.token_ids[-1]]


def test_flags_take_trajectories_out_of_the_loss(flags):
    args = train_rl.Args(**flags, mask_truncated_completions=True)
    model, (part,) = scored_step(args)
    for t in (t for mb in part for t in mb.trajectories):
        t.finish = "tool_limit"
    optimizer = NoStep([p for p in model.parameters() if p.requires_grad], lr=1.0)
    stats = step(model, optimizer, part, args)
    assert stats["loss"] == 0.0 and all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("error::UserWarning")  # torch warns of a schedule that goes on without its optimizer
def test_non_finite_updates_are_skipped(flags, capsys):
    args = train_rl.Args(**flags)
    model, (part,) = scored_step(args)
    part[0].trajectories[0].advantage[-1] = float("nan")
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    stats = step(model, optimizer, part, args)
    assert stats["skipped_updates"] == 1.0 and all(torch.equal(a, b) for a, b in zip(before, trained))
    assert all(p.grad is None for p in trained)


def test_question_order_covers_every_epoch():
    steps = [question_indices(7, 3, s, 5) for s in range(4)]
    assert len(set(steps[0] + steps[1])) == 6 and len(set(steps[2] + steps[3])) == 6
    assert steps[:2] != steps[2:]


def run_rl(flags, **changes):
    return train_rl.main(train_rl.Args(**flags | changes))


def same_files(a, b, names):
    for name in names:
        assert (Path(a) / name).read_bytes() == (Path(b) / name).read_bytes(), name


def logged(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


LEARNED = {"entropy_regulariser": "decoupled", "entropy_target": "relative", "mode": "think"}
REFERENCE = {"indicator": "reference", "reward": "entropy_dense", "advantage": "entropy_dense"}


@pytest.mark.parametrize(
    "changes",
    [{}, {"beta": 0.05, "num_iterations": 2}, {**LEARNED, "updates_per_batch": 2}, REFERENCE],
)
def test_resume_is_bitwise(flags, tmp_path, changes):
    whole = run_rl(flags, output_dir=str(tmp_path / "whole"), **changes)
    run_rl(flags, output_dir=str(tmp_path / "cut"), **changes)
    for gone in ("result.json", "adapter_model.safetensors"):
        (tmp_path / "cut" / gone).unlink()
    shutil.rmtree(tmp_path / "cut/checkpoint-4")  # as if killed in step 4, with lines of steps 3 and 4 written
    assert run_rl(flags, output_dir=str(tmp_path / "cut"), **changes) == whole
    same_files(tmp_path / "whole", tmp_path / "cut", ["adapter_model.safetensors", "result.json", "samples.jsonl"])
    assert logged(tmp_path / "whole") == logged(tmp_path / "cut") and len(logged(tmp_path / "cut")) == 4


def test_alarms_speak_once(capsys):
    entropy, clipped = metrics.entropy_alarm, metrics.clipped_alarm
    assert entropy(5.5, {}) and "token entropy 5.5000 nats is outside 0.01 to 5.0" in capsys.readouterr().out
    assert entropy(0.001, {"entropy_alarm": 1.0}) and not entropy(2.0, {})
    assert clipped(0.25, {}, 16, 6)
    assert "25% of the responses ran out of --max_completion_length 16" in capsys.readouterr().out
    assert clipped(0.25, {"clipped_alarm": 1.0}, 16, 6) and not clipped(0.2, {}, 16, 6)
    assert not capsys.readouterr().out


def test_no_clipping_is_not_no_training(flags, tmp_path):
    free, far = (run_rl(flags, output_dir=str(tmp_path / f"{n}"), max_grad_norm=n) for n in (0.0, 1e9))
    assert free == far and free["grad_norm"] > 0
    same_files(tmp_path / "0.0", tmp_path / "1000000000.0", ["adapter_model.safetensors"])


def test_beta_long_takes_one_step_per_optimizer_step(flags, monkeypatch):
    """Relative target 1.15 × step 0's entropy: β rises by lr · (target − mean H) each time, and the next update has it."""
    seen, real = [], train_rl.update

    def spy(model, optimizer, scheduler, batch, part, betas, args):
        seen.append((sum(sum(t.entropy) / t.completion_tokens for t in part) / len(part), betas))
        return real(model, optimizer, scheduler, batch, part, betas, args)

    monkeypatch.setattr(train_rl, "update", spy)
    flags |= LEARNED | {"max_steps": 2, "save_steps": 1, "num_iterations": 2, "updates_per_batch": 2}
    result = run_rl(flags)
    target, beta = 1.15 * sum(mean for mean, _ in seen[:2]) / 2, 0.01
    assert len(seen) == 2 * 4
    for mean, betas in seen:
        assert betas == pytest.approx([beta] * 4)
        beta += 0.02 * (target - mean)
    assert result["beta_long"] == pytest.approx(beta) and beta > 0.02
    state = json.loads((Path(flags["output_dir"]) / "checkpoint-2/trainer_state.json").read_text())["entropy_state"]
    assert state["beta_long"] == result["beta_long"] and state["target_long"] == pytest.approx(target)


def test_a_skipped_update_changes_neither_weights_nor_beta(flags, monkeypatch):
    real = train_rl.policy_loss
    monkeypatch.setattr(train_rl, "policy_loss", lambda *a: (real(*a)[0] * float("nan"), real(*a)[1]))
    result = run_rl(flags, **LEARNED, max_steps=1, save_steps=1)
    assert result["skipped_updates"] == 1 and result["beta_long"] == 0.01 and result["grad_norm"] == 0
    adapter = load_file(Path(flags["output_dir"]) / "adapter_model.safetensors")
    assert not any(value.any() for name, value in adapter.items() if "lora_B" in name)  # as it began


def test_reference_entropies_are_those_of_the_start(flags):
    """The scored policy was moved off the reference: its entropies differ, the reference's are the base model's."""
    args = train_rl.Args(**flags, reward="entropy_sparse", indicator="reference", beta=0.1)
    model, (part,) = scored_step(args)
    for t in (t for mb in part for t in mb.trajectories):
        assert t.ref_entropy != t.entropy
        with use_reference(model):
            _, expected = token_stats(model, collate([t], 0, torch.device("cpu")))
        assert t.ref_entropy == pytest.approx(expected[0].tolist(), abs=1e-5)


def test_mode_metrics_by_hand():
    def row(mode, entropy):
        meta = {"level": "long"} if len(entropy) > 1 else {"level": 1}
        return SimpleNamespace(
            mode=mode, entropy=[0.0, *entropy], prompt_len=1, completion_tokens=len(entropy), meta=meta
        )

    rows = [row("think", [0.5, 0.1]), row("think", [0.7, 0.3, 0.2]), row("no_think", [0.6])]
    assert metrics.mode_metrics(rows, 1) == pytest.approx(
        {"think_rate": 2 / 3, "think_rate/long": 1.0, "think_rate/1": 0.0, "entropy/think": 0.35, "entropy/no_think": 0.6, "entropy/decision": 0.6}
    )
    assert metrics.mode_metrics(rows, 2)["entropy/decision"] == pytest.approx((0.6 + 1.0 + 0.6) / 3)
    assert metrics.mode_metrics(rows[2:], 0) == {"think_rate": 0.0, "think_rate/1": 0.0, "entropy/no_think": 0.6}


def test_tokens_that_decide_the_mode():
    assert metrics.mode_tokens(byte_tokenizer()) == len("<think>\n") + 1
    assert metrics.mode_tokens(build_tokenizer()) == 1
    opened = byte_tokenizer(extra=["<think>", "\n\n"])  # the template writes <think>\n: what follows decides
    assert metrics.mode_tokens(opened) == 2 and metrics.mode_tokens(opened, "<think>\n") == 3
    assert metrics.mode_tokens(opened, conversation.NO_THINK) == 0


def test_training_moves_the_policy_and_finished_runs_stay(flags, capsys):
    result = run_rl(flags, learning_rate=0.02, max_steps=20)
    rewards_seen = [row["reward"] for row in logged(flags["output_dir"])]
    assert sum(rewards_seen[-5:]) > sum(rewards_seen[:5]) + 1.0  # 0.2 per step
    assert f"20 steps, the last with reward {result['reward']:.3f}" in capsys.readouterr().out
    assert run_rl(flags, learning_rate=0.02, max_steps=20) == result
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(DataError, match="holds a run with --learning_rate 0.02, not 0.01"):
        run_rl(flags, learning_rate=0.01, max_steps=20)


def test_a_start_that_computed_nothing_does_not_hold_the_folder(flags):
    with pytest.raises(DataError, match="nothere.jsonl: no such file"):
        run_rl(flags, data="nothere.jsonl")
    assert run_rl(flags)["steps"] == 4  # with the right file it starts


def test_a_run_does_not_go_on_with_changed_data(flags):
    run_rl(flags)
    with open(flags["data"], "a") as out:
        out.write(json.dumps({"id": "new", "question": "1?", "answer": "1"}) + "\n")
    with pytest.raises(DataError, match="q.jsonl has changed since the run in --output_dir .* was started"):
        run_rl(flags)


def test_a_run_goes_on_with_another_number_of_workers(tmp_path):
    @dataclasses.dataclass
    class Args(RunArgs):
        workers: int = 1
        seeds: int = 1

    opened = run.start_run(Args(output_dir=str(tmp_path / "run"), workers=2))
    opened.log(1, {})  # something was computed
    run.start_run(Args(output_dir=str(tmp_path / "run"), workers=1))
    with pytest.raises(DataError, match="holds a run with --seeds 1, not 2"):
        run.start_run(Args(output_dir=str(tmp_path / "run"), seeds=2))


def command(script, flags):
    words = [sys.executable, str(ROOT / script)]
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    return words


def test_sigkill_and_resume(flags, tmp_path):
    """A real process, killed at some moment after its first checkpoint: metrics and adapter as uninterrupted."""
    flags |= {"reward": "et_agent", "max_steps": 6, "save_steps": 1, "beta": 0.01}
    subprocess.run(command("train_rl.py", flags | {"output_dir": tmp_path / "whole"}), check=True, cwd=ROOT)
    process = subprocess.Popen(command("train_rl.py", flags | {"output_dir": tmp_path / "cut"}), cwd=ROOT)
    deadline = time.time() + 120
    while not (tmp_path / "cut/checkpoint-1").exists() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut/result.json").exists()
    subprocess.run(command("train_rl.py", flags | {"output_dir": tmp_path / "cut"}), check=True, cwd=ROOT)
    same_files(tmp_path / "whole", tmp_path / "cut", ["adapter_model.safetensors", "result.json"])
    assert logged(tmp_path / "whole") == logged(tmp_path / "cut")


def test_4bit_rl_and_checkpointing_run(flags):
    pytest.importorskip("bitsandbytes")
    result = run_rl(flags, load_in_4bit=True, gradient_checkpointing=True, max_steps=2)
    assert result["grad_norm"] > 0


def test_adapter_folder_goes_on_from_its_adapter(flags, tmp_path):
    run_rl(flags)
    second = run_rl(flags, model_name_or_path=flags["output_dir"], output_dir=str(tmp_path / "second"), max_steps=1)
    fresh = run_rl(flags, output_dir=str(tmp_path / "fresh"), max_steps=1)
    assert second["entropy"] != fresh["entropy"]


def test_resume_keeps_lines_whole_and_drops_what_a_kill_cut(tmp_path):
    rows = [{"step": step, "response": f"{step} a\u2028b\x85c é"} for step in (1, 2, 3, 4)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path = tmp_path / "samples.jsonl"
    for cut in (0, 1, 4, 5):  # in the middle of é, and before the last line feed
        path.write_bytes(text.encode()[: len(text.encode()) - cut])
        run.Run(tmp_path, None, None).forget_after(3)
        assert [json.loads(line) for line in path.read_bytes().decode().removesuffix("\n").split("\n")] == rows[:3]
        assert path.read_bytes().endswith(b"\n")


# ---------------------------------------------------------------------------------------------------- SFT


@pytest.fixture
def sft_flags(tiny_model, tmp_path):
    rows = [
        {
            "id": f"d{i}",
            "question": f"{i}+{i}?",
            "answer": str(2 * i),
            "response": [
                {"role": "model", "text": f"<think>add</think>\n<python>{i}+{i}</python>"},
                {"role": "tool", "name": "python", "text": str(2 * i)},
                {"role": "model", "text": f"<answer>\\boxed{{{2 * i}}}</answer>"},
            ],
        }
        for i in range(6)
    ]
    rows.append({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}] * 2})
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return dict(
        model_name_or_path=str(tiny_model),
        data=str(path),
        output_dir=str(tmp_path / "sft"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=6,
        save_steps=2,
        threads=1,
        learning_rate=5e-3,
    )


def test_sft_examples_are_masked_like_rollouts(sft_flags):
    args = train_sft.Args(**sft_flags)
    _, tokenizer = load_policy(args)
    examples = train_sft.load_examples(args.data, tokenizer, args, len(tokenizer))
    t = examples[2]
    trained = tokenizer.decode([i for i, m in zip(t.token_ids, t.loss_mask) if m])
    assert trained == "<think>add</think>\n<python>2+2</python><answer>\\boxed{4}</answer>"
    assert t.response_text == trained.replace("</python>", "</python>\n<result>\n4\n</result>\n") and not t.sampled
    chat = examples[-1]
    trained = tokenizer.decode([i for i, m in zip(chat.token_ids, chat.loss_mask) if m])
    assert trained == "hello<|im_end|>hello<|im_end|>"


def trained_text(t, tokenizer):
    return tokenizer.decode([i for i, m in zip(t.token_ids, t.loss_mask) if m])


@pytest.mark.parametrize("family", ["qwen2.5-base", "llama-3.1", "gemma-2", "mistral-0.3", "r1"])
def test_sft_ends_a_turn_with_what_the_template_writes_after_it(family):
    """… and the sampler stops there (tests/test_rollout.py): Qwen2.5's base has another eos token."""
    tokenizer = family_tokenizer(family)
    end = turn_end(tokenizer)
    chat = [{"role": "user", "content": f"Where?{end}"}, {"role": "assistant", "content": f"Paris{end}is"}]
    t = train_sft.from_messages({"messages": chat * 2}, tokenizer, "here")
    assert trained_text(t, tokenizer).replace(" ", "") == f"Paris{end}is{end}" * 2
    trained = [i for i, m in zip(t.token_ids, t.loss_mask) if m]
    assert trained.count(tokenizer.convert_tokens_to_ids(end)) == 2


@pytest.mark.parametrize(
    "written, trained, mode",
    [
        ("<think>so</think>2", "so</think>2", "think"),
        ("<think>\nso</think>2", "so</think>2", "think"),
        ("2", "\n</think>\n\n2", "no_think"),
        ("<think>\n\n</think>\n\n2", "\n</think>\n\n2", "no_think"),
    ],
)
def test_sft_goes_on_where_the_template_opens_a_thought(written, trained, mode):
    tokenizer = family_tokenizer("qwen3-thinking")
    row = {"id": "d", "question": "1+1?", "answer": "2", "response": [{"role": "model", "text": written}]}
    t = train_sft.from_demonstration(row, tokenizer, "here")
    assert trained_text(t, tokenizer) == trained and t.response_text == "<think>\n" + trained and t.mode == mode
    draft = start_draft(question_of(row, "here"), 0, tokenizer, SamplingArgs(), (0,))
    assert t.token_ids[: len(draft.ids)] == draft.ids and t.loss_mask[: len(draft.ids)] == draft.mask
    tokenizer.chat_template = tokenizer.chat_template.replace(  # shows the last turn as Qwen3 Thinking does
        "{{ m.content }}", "{{ '<think>\\n' if m.role == 'assistant' }}{{ m.content.removeprefix('<think>').lstrip() }}"
    )
    chat = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": written}]
    if mode == "think":
        t = train_sft.from_messages({"messages": chat}, tokenizer, "here")
        assert trained_text(t, tokenizer) == trained + "<|im_end|>" and t.mode == mode


def test_sft_results_of_parallel_calls_share_their_frame_as_in_a_rollout():
    tokenizer = family_tokenizer("qwen2.5")
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    parts = [("model", call * 2), ("tool", "1"), ("tool", "<|im_end|>"), ("model", "so<|im_end|>")]
    row = {"id": "d", "question": "?", "answer": [{"f": {}}], "task": "function"}
    row["tools"] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    row["response"] = [{"role": role, "text": text} for role, text in parts]
    t = train_sft.from_demonstration(row, tokenizer, "here")
    assert trained_text(t, tokenizer) == call * 2 + "<|im_end|>so<|im_end|>"
    assert t.response_text.count("<|im_start|>assistant") == 1 and [s.kind for s in t.spans].count("tool_result") == 1
    assert "< |im_end|>" in t.response_text
    bare = byte_tokenizer()
    with pytest.raises(DataError, match="does not declare functions, such as 'f'"):
        train_sft.from_demonstration(row, bare, "here")
    chat = {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant")], "tools": row["tools"]}
    with pytest.raises(DataError, match="does not declare functions, such as 'f'; here: leave out"):
        train_sft.from_messages(chat, bare, "here")


def test_a_resumed_run_keeps_its_day(sft_flags):
    args = train_sft.Args(**sft_flags)
    opened = run.start_run(args)
    config = opened.dir / "config.json"
    today = str(datetime.date.today())
    assert args.date == today == json.loads(config.read_text())["date"]
    (opened.dir / "metrics.jsonl").write_text("")
    config.write_text(config.read_text().replace(today, "2024-02-03"))
    args = train_sft.Args(**sft_flags)
    run.start_run(args)
    assert args.date == "2024-02-03"
    with pytest.raises(DataError, match="a run with --date 2024-02-03, not 2024-02-04"):
        run.start_run(train_sft.Args(**sft_flags, date="2024-02-04"))


def test_sft_refuses_ids_of_another_tokenizer(sft_flags, tmp_path):
    args = train_sft.Args(**sft_flags)
    _, tokenizer = load_policy(args)
    t = train_sft.load_examples(args.data, tokenizer, args, len(tokenizer))[0]
    (tmp_path / "t.jsonl").write_text(t.to_json() + "\n")
    assert train_sft.load_examples(str(tmp_path / "t.jsonl"), tokenizer, args, len(tokenizer)) == [t]
    t.token_ids = [(i + 1) % 256 for i in t.token_ids]
    (tmp_path / "t.jsonl").write_text(t.to_json() + "\n")
    with pytest.raises(DataError, match=f"t.jsonl:1: trajectory {t.question_id}/0 is of another tokenizer"):
        train_sft.load_examples(str(tmp_path / "t.jsonl"), tokenizer, args, len(tokenizer))


def test_sft_loss_is_the_token_mean_of_the_step_and_falls(sft_flags, capsys):
    args = train_sft.Args(**sft_flags | {"gradient_accumulation_steps": 4})
    result = train_sft.main(args)
    model, tokenizer = load_policy(args)  # a fresh adapter is the base
    rows = train_sft.load_examples(args.data, tokenizer, args, len(tokenizer))
    logp = [token_stats(model, collate([t], 0, torch.device("cpu")))[0].sum().item() for t in rows]
    assert result["first_loss"] == pytest.approx(-sum(logp) / sum(t.completion_tokens for t in rows), rel=1e-4)
    assert result["loss"] < result["first_loss"] - 0.5
    assert f"loss {result['first_loss']:.3f} → {result['loss']:.3f}; the adapter is there" in capsys.readouterr().out


def test_sft_resume_is_bitwise(sft_flags, tmp_path):
    whole = train_sft.main(train_sft.Args(**sft_flags | {"output_dir": str(tmp_path / "whole")}))
    train_sft.main(train_sft.Args(**sft_flags | {"output_dir": str(tmp_path / "cut")}))
    (tmp_path / "cut/result.json").unlink()
    shutil.rmtree(tmp_path / "cut/checkpoint-6")
    assert train_sft.main(train_sft.Args(**sft_flags | {"output_dir": str(tmp_path / "cut")})) == whole
    same_files(tmp_path / "whole", tmp_path / "cut", ["adapter_model.safetensors"])


def test_rl_refuses_written_trajectories(sft_flags, flags):
    args = train_sft.Args(**sft_flags)
    model, tokenizer = load_policy(args)
    examples = train_sft.load_examples(args.data, tokenizer, args, len(tokenizer))
    with pytest.raises(ValueError, match="d0/0 was not sampled"):
        train_rl.micro_batches(examples[:1], model, 0, train_rl.Args(**flags))


# ---------------------------------------------------------------------------------------------------- bad input


def error_of(script, flags, monkeypatch, capsys):
    words = [w for name, value in flags.items() for w in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *words])
    with pytest.raises(SystemExit) as exit_:
        cli(script.main, script.Args)
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if "error" in line]) == 1
    return lines[-1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lerning_rate": 1}, r"unknown flag --lerning_rate \(did you mean --learning_rate\?\)"),
        ({"learning_rate": "fast"}, "--learning.rate.*'fast'"),
        ({"reward": "correctness"}, "--reward.*'correctness'"),
        ({"output_dir": ""}, "--output_dir is required"),
        ({"data": ""}, "--data is required"),
        ({"learning_rate": -1}, "--learning_rate must be a number from 0 on, not -1.0"),
        ({"limit": -5}, "--limit must be a number from 0 on, not -5"),
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size must be at least 1"),
        ({"search_top_k": 0}, "--search_top_k must be at least 1"),
        ({"epsilon": 2}, "--epsilon must be from 0 to 1, not 2.0"),
        ({"dual_clip": 1.2}, r"--dual_clip 1.2 must be 0 or above 1 \+ --epsilon_high 0.2"),
        ({"top_p": 0.9}, "unknown flag --top_p"),
        ({"temperature": 0}, "--temperature 0.0: RL needs a positive temperature"),
        ({"questions_per_step": 3, "updates_per_batch": 2}, "--questions_per_step 3 is not a multiple"),
        ({"questions_per_step": 9}, "holds 7 questions, fewer than --questions_per_step 9"),
        ({"max_prompt_length": 10}, "question 'q0': its prompt has .* more than --max_prompt_length 10"),
        ({"index": "nowhere"}, "--index nowhere: no such folder"),
        ({"lora_target_modules": "lm_head"}, "lm_head: the lm_head stays frozen"),
        ({"model_name_or_path": "no/such/folder"}, "--model_name_or_path no/such/folder"),
        ({"task": "poetry"}, "--task.*'poetry'"),
        ({"reward": "entropy_dense"}, "--reward entropy_dense does not go with --advantage grpo"),
        ({"reward": "entropy_sparse", "temperature": 0.8}, "reads entropies at --temperature 1, not 0.8"),
        ({"entropy_coef": 0.1}, "--entropy_coef 0.1 has no effect with --entropy_regulariser none, only with constant"),
        ({"entropy_regulariser": "constant"}, "--entropy_regulariser constant needs an --entropy_coef above 0"),
        ({"sigma_tool": 5}, "--sigma_tool 5.0 has no effect with --reward correct, only with et_agent"),
        ({"delta_margin": 1, "reward": "autotool"}, "only with entropy_sparse or entropy_dense"),
        ({"beta_long": 2, "entropy_regulariser": "adaptive"}, "--beta_long 2.0 must be from 0 to 1"),
    ],
)
def test_bad_flags_end_in_one_line(flags, changes, message, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = error_of(train_rl, flags | changes, monkeypatch, capsys)
    assert re.search(message, line), line


@pytest.mark.parametrize(
    "lines, message",
    [
        (['{"id": "a", "question": "x", "answer": "1"}', "{broken"], r"q\.jsonl:2: not valid JSON"),
        (['{"id": "a", "answer": "1"}'], r"q\.jsonl:1: missing field 'question'"),
        (['{"id": "a", "question": "x"}'], r"q\.jsonl:1: missing or empty field 'answer'"),
        (['{"id": "a", "question": "  ", "answer": "1"}'], r"q\.jsonl:1: empty field 'question'"),
        (['{"id": "a", "question": "x", "answer": "1"}'] * 2, r"q\.jsonl:2: duplicate id 'a'"),
        (['{"id": "a", "question": "x", "answer": "1", "task": "song"}'], r"q\.jsonl:1: field 'task' is 'song'"),
        ([], r"q\.jsonl: holds no questions"),
    ],
)
def test_bad_data_is_named_before_any_training(flags, lines, message, monkeypatch, capsys):
    Path(flags["data"]).write_text("".join(line + "\n" for line in lines))
    line = error_of(train_rl, flags, monkeypatch, capsys)
    assert re.search(message, line), line
    assert not (Path(flags["output_dir"]) / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "row, message",
    [
        ({"messages": "hi"}, "field 'messages' is 'hi', not a list of objects"),
        ({"messages": [{"content": "q"}]}, "field 'messages' part 0 has no text 'role'"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{}]}, {"role": "user"}]},
            "field 'messages' part 1 has no text 'content'",
        ),
    ],
)
def test_chats_of_a_wrong_shape_are_named(row, message):
    with pytest.raises(DataError, match=f"here: {message}"):
        train_sft.from_messages(row, None, "here")


MESSAGE = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
HEAD = "{% for m in messages %}"
TAIL = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LAST = "(loop.last and m.role == 'assistant')"
CALLS = "{% for c in m.tool_calls or [] %}<tool_call>{{ (c.function or c).name }}</tool_call>{% endfor %}"
TEMPLATES = {
    "plain": HEAD + MESSAGE + TAIL,
    "strips": HEAD + MESSAGE.replace("m.content", "m.content.split('</think>')[-1]") + TAIL,  # R1's
    "strips earlier": HEAD
    + MESSAGE.replace("m.content", "(m.content if loop.last else m.content.split('</think>')[-1])")
    + TAIL,
    "empty think": HEAD  # Qwen3's
    + "<|im_start|>{{ m.role }}\n"
    + "{% if " + LAST + " and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    + "{% if '</think>' in m.content %}<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}"
    + "\n</think>\n\n{{ m.content.split('</think>')[-1].strip() }}{% else %}{{ m.content }}{% endif %}"
    + CALLS + "<|im_end|>\n"
    + TAIL,
    "opens": HEAD + MESSAGE + TAIL.replace("assistant\n", "assistant\n<think>\n"),
    "trims": HEAD + MESSAGE.replace("m.content", "m.content | trim") + TAIL,
    "spaces": HEAD + MESSAGE.replace("{{ m.content", "{{ ' ' if m.role == 'assistant' else '' }}{{ m.content") + TAIL,
    "adds": HEAD + MESSAGE.replace("{{ m.c", "{{ 'final:' if m.role == 'assistant' else '' }}{{ m.c") + TAIL,
    "no calls": HEAD + MESSAGE + TAIL,
    "calls only": HEAD
    + MESSAGE.replace("{{ m.content }}", "{% if m.tool_calls %}" + CALLS + "{% else %}{{ m.content }}{% endif %}")
    + TAIL,
}  # fmt: skip
THOUGHT = "<think>17*23</think>The answer is 391."
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}]}


def chat(*contents):
    messages = ({"role": "user" if i % 2 == 0 else "assistant", "content": c} for i, c in enumerate(contents))
    return {"messages": list(messages)}


def trained(row, template, read=train_sft.from_messages):
    """(what has loss, the whole text) of an SFT row under a template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    t = read(row, tokenizer, "here")
    return tokenizer.decode([i for i, m in zip(t.token_ids, t.loss_mask) if m]), tokenizer.decode(t.token_ids)


@pytest.mark.parametrize(
    "template, contents, target",
    [
        ("plain", ["q", THOUGHT], THOUGHT),
        ("strips", ["q", THOUGHT], THOUGHT),
        ("strips", ["q", "391"], "391"),
        ("strips earlier", ["q", THOUGHT], THOUGHT),
        ("empty think", ["q", "391"], "391"),
        ("empty think", ["q", THOUGHT], THOUGHT),
        ("empty think", ["q", "<think>\n\n</think>\n\n391"], "<think>\n\n</think>\n\n391"),
        ("empty think", ["q", "391", "q", "392"], "391<|im_end|>392"),
        ("opens", ["q", THOUGHT], "17*23</think>The answer is 391."),
        ("opens", ["q", "<think>\n17*23</think>391"], "17*23</think>391"),
        ("trims", ["q", " 391\n", "q", "392 "], "391<|im_end|>392"),
        ("spaces", ["q", "391", "q", "392"], " 391<|im_end|> 392"),
    ],
)
def test_chats_train_what_the_row_says(template, contents, target):
    assert trained(chat(*contents), template)[0] == target + "<|im_end|>"
    if template == "opens":  # the thought that the template opens is in the context, once, and has no loss
        whole = trained(chat(*contents), template)[1]
        assert whole.count("<think>") == 1 and whole.endswith("assistant\n<think>\n" + target + "<|im_end|>")


def test_a_call_without_thoughts_is_trained_under_a_template_that_adds_them():
    question, answer = chat("q", "5")["messages"]
    row = {"messages": [question, CALL, {"role": "tool", "content": "5"}, answer]}
    assert trained(row, "empty think")[0] == "<tool_call>add</tool_call><|im_end|>5<|im_end|>"


@pytest.mark.parametrize(
    "template, row, message",
    [
        ("strips", chat("q", THOUGHT, "q", "a"), "the chat template changes messages before number 3 when the chat"),
        ("strips earlier", chat("q", THOUGHT, "q", "a"), "the chat template changes messages before number 3"),
        ("opens", chat("q", "391"), "part 1: the chat template opens a thought, which its text does not"),
        ("adds", chat("q", "391"), "field 'messages' part 1: the chat template puts 'final:' before its text"),
        ("no calls", {"messages": [{"role": "user", "content": "q"}, CALL]}, "leaves out its call of 'add'"),
        (
            "calls only",
            {"messages": [{"role": "user", "content": "q"}, CALL | {"content": "I add."}]},
            "leaves out its text 'I add.'",
        ),
        (
            "plain",
            {"messages": [*chat("q")["messages"], {"role": "assistant", "content": "a", "reasoning_content": "r"}]},
            "leaves out its reasoning_content 'r'",
        ),
        ("plain", chat("q", "a") | {"system": "be brief"}, "field 'system' would not reach the prompt"),
    ],
)  # fmt: skip
def test_chats_that_a_template_changes_are_refused(template, row, message):
    with pytest.raises(DataError, match=f"here: .*{message}"):
        trained(row, template)


def test_pairs_of_prompt_and_completion():
    def read(row):
        return trained(row, "plain", train_sft.from_pair)

    assert read({"prompt": "2+2=", "completion": " 4"}) == (" 4<|im_end|>", "2+2= 4<|im_end|>")
    assert read({"prompt": "2+2=", "completion": " 4<|im_end|>"})[0] == " 4<|im_end|>"
    prompt, completion = chat("q", "a", "r")["messages"], [{"role": "assistant", "content": "b"}]
    target, whole = read({"prompt": prompt, "completion": completion})
    assert target == "b<|im_end|>" and "assistant\na<|im_end|>" in whole  # an earlier answer is context
    for row, message in (
        ({"prompt": prompt, "completion": "b"}, "field 'prompt' is .*both are texts or both lists"),
        ({"completion": "b"}, "field 'prompt' is 'None'"),
        ({"prompt": prompt, "completion": ["b"]}, "field 'completion' part 0 has no text 'role'"),
        ({"prompt": prompt, "completion": prompt[:1]}, "field .messages. needs an assistant message"),
    ):
        with pytest.raises(DataError, match=f"here: {message}"):
            read(row)


def test_sft_rows_from_every_kind_of_file(sft_flags, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    args, tokenizer = train_sft.Args(**sft_flags), byte_tokenizer()
    rows = [{"prompt": "a", "completion": "b"}, chat("q", "x"), {"messages": [*chat("q")["messages"], CALL]}]
    tokenizer.chat_template = TEMPLATES["empty think"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress((tmp_path / "x.jsonl").read_bytes()))
    columns = dict.fromkeys(("prompt", "completion", "messages"))
    parquet.write_table(pyarrow.Table.from_pylist([columns | row for row in rows]), tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("prompt,completion\na,b\n")

    def texts(name):
        path = str(tmp_path / name)
        return [tokenizer.decode(t.token_ids) for t in train_sft.load_examples(path, tokenizer, args, len(tokenizer))]

    assert texts("x.jsonl") == texts("x.jsonl.gz") == texts("x.parquet")
    assert texts("x.csv") == texts("x.jsonl")[:1] == ["ab<|im_end|>"]


@pytest.mark.parametrize("response", ["x", ["x"], [{"role": "model"}]])
def test_demonstrations_of_a_wrong_shape_are_named(response):
    row = {"id": "a", "question": "q", "answer": "1", "response": response}
    with pytest.raises(DataError, match="here: field 'response' (is 'x', not a list|part 0 has no text)"):
        train_sft.from_demonstration(row, build_tokenizer(), "here")


def test_a_folder_with_other_files_is_not_taken(flags, monkeypatch, capsys):
    Path(flags["output_dir"]).mkdir()
    (Path(flags["output_dir"]) / "thesis.txt").write_text("precious")
    assert "is in use" in error_of(train_rl, flags | {"overwrite": True}, monkeypatch, capsys)
    assert (Path(flags["output_dir"]) / "thesis.txt").exists()


def test_config_file_gives_defaults(flags, tmp_path, monkeypatch):
    run_rl(flags, max_steps=1)
    args = parse_args(
        train_rl.Args, ["--config", f"{flags['output_dir']}/config.json", "--seed", "3", "--output_dir", "x"]
    )
    assert args.seed == 3 and args.output_dir == "x" and args.lora_r == 4 and args.max_completion_length == 16


# ---------------------------------------------------------------------------------------------------- forking


def test_a_fork_adds_a_reward_by_a_function_and_a_line(flags, tmp_path):
    """In a copy of the repository: one function, one dict line, then --reward short."""
    fork = tmp_path / "fork"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.split():
        if not name.startswith(("data/tiny", "results", "tests")) and (ROOT / name).is_file():
            (fork / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, fork / name)
    text = (fork / "grpo/rewards.py").read_text()
    text = text.replace("REWARDS = {\n", 'REWARDS = {\n    "short": short,\n')
    function = "def short(group, correctness, formed, a):\n    return [{'total': float(t.sample_idx)} for t in group]\n"
    (fork / "grpo/rewards.py").write_text(text.replace("\n# name -> (group", f"\n{function}\n\n# name -> (group"))
    words = command("train_rl.py", flags | {"reward": "short", "max_steps": 2})
    words[1] = "train_rl.py"
    subprocess.run(words, check=True, cwd=fork, env=os.environ | {"PYTHONPATH": ""})
    rows = logged(flags["output_dir"])
    assert [row["reward"] for row in rows] == [1.5, 1.5] and rows[1]["grad_norm"] > 0


def test_a_start_killed_between_its_two_files_starts_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "env.json").write_text("{}")
    opened = run.start_run(RunArgs(output_dir=str(tmp_path / "run"), threads=1))
    assert opened.finished is None and json.loads((tmp_path / "run" / "env.json").read_text())
    assert (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("script, found", [(train_rl, True), (train_sft, False)])
def test_a_tracker_that_is_not_installed_is_one_line_before_any_work(flags, script, found, monkeypatch, capsys):
    """Also beside a folder of the tracker's earlier runs, which Python would import as an empty package."""
    folder = importlib.machinery.ModuleSpec("wandb", None, is_package=True)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: (folder if found else None) if n == "wandb" else real(n, *a))
    own = {f.name for f in dataclasses.fields(script.Args)}
    given = {flag: value for flag, value in flags.items() if flag in own} | {"report_to": "wandb"}
    assert "--report_to wandb: not installed" in error_of(script, given, monkeypatch, capsys)
    assert not Path(flags["output_dir"]).exists()
