"""core/distributed.py under a real torchrun with two gloo processes: gradients, whole runs, a process that dies.

python -m pytest tests/test_distributed.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import rollout
import train_rl
from core import distributed
from core.model import load_policy
from core.trajectory import save_trajectories
from data.questions import load_questions

ROOT = Path(__file__).parent.parent
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]


def run(command, **options):
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)
    assert out.returncode == 0, out.stderr[-3000:]
    return out


@pytest.fixture
def port():
    """A free port, so that runs at the same time do not meet."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture
def settings(tiny_model, tmp_path):
    """Flags of a small RL run on random questions."""
    questions = tmp_path / "q.jsonl"
    rows = ({"id": f"q{i}", "question": f"{i} plus {i}?", "answer": str(2 * i)} for i in range(8))
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(tiny_model),
        "data": str(questions),
        "output_dir": str(tmp_path / "run"),
        "num_generations": 3,
        "questions_per_step": 4,
        "max_completion_length": 24,
        "per_device_train_batch_size": 4,
        "threads": 1,
        "lora_r": 4,
        "max_grad_norm": 1e9,
    }


def test_one_process_shares_nothing():
    assert distributed.share([1, 2, 3]) == [1, 2, 3] and distributed.gather([1]) == [1]
    assert distributed.sum_values({"a": 2.0}) == {"a": 2.0} and (distributed.rank(), distributed.count()) == (0, 1)


def test_shares_cover_every_item_once(monkeypatch):
    for count in (1, 2, 3, 5):
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(count))
        items = []
        for rank in range(count):
            monkeypatch.setenv("RANK", str(rank))
            items += distributed.share(list(range(7)))
        assert items == list(range(7))


def test_without_any_gradient_the_optimizer_does_nothing_as_in_one_process():
    """AdamW moves weights by its momentum on gradients of 0, and not where there are none."""
    quiet, trained = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        distributed.sum_gradients([quiet, trained])
        assert quiet.grad is None and trained.grad is None
        trained.grad = torch.tensor([1.0, 2.0])
        distributed.sum_gradients([quiet, trained])
        assert quiet.grad.tolist() == [0.0, 0.0] and trained.grad.tolist() == [1.0, 2.0]
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradient_of_one(settings, tmp_path, port):
    """Five steps, each from the same adapter and the same trajectories: 1e-6 of the gradient's norm."""
    args = train_rl.Args(**settings)
    model, tokenizer = load_policy(args)
    questions = load_questions(args.data)
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        adapter = [0.05 * torch.randn(p.shape, generator=generator) for p in model.parameters() if p.requires_grad]
        torch.save(adapter, tmp_path / f"adapter-{step}.pt")
        stored = rollout.rollout(model, tokenizer, questions[step : step + 4], args, {}, (0, step))
        for k, t in enumerate(stored):
            t.rewards = {"total": float(k % 3)}
            t.advantage = [(k % 5 - 2.0) * m for m in t.loss_mask]
        save_trajectories(tmp_path / f"rollouts-{step}.jsonl", stored)
    (tmp_path / "args.json").write_text(json.dumps(settings | {"loss_type": "dapo", "updates_per_batch": 2}))
    program = [str(ROOT / "tests" / "gradients_of_steps.py"), str(tmp_path / "args.json")]
    run([sys.executable, *program, str(tmp_path / "one.pt")])
    run([*TWO, port, *program, str(tmp_path / "two.pt")])
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    for (expected, stats), (found, found_stats) in zip(one, two, strict=True):
        for a, b in zip(expected, found, strict=True):
            norm = sum(g.double().pow(2).sum() for g in a) ** 0.5
            difference = sum((g.double() - h.double()).pow(2).sum() for g, h in zip(a, b, strict=True)) ** 0.5
            assert norm > 0 and difference <= 1e-6 * norm
        for a, b in zip(stats, found_stats, strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-7)


def command_line(settings, **changes):
    flags = {k: str(v) for k, v in (settings | changes).items()}
    return [str(ROOT / "train_rl.py"), *(word for name, value in flags.items() for word in (f"--{name}", value))]


def metrics_of(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def test_a_run_of_two_processes_is_the_run_of_one(settings, tmp_path, port):
    flags = settings | {"max_steps": 2, "advantage": "grpo_no_std", "entropy_coef": 0.5, "entropy_regulariser": "constant"}
    run([sys.executable, *command_line(flags, output_dir=tmp_path / "one")])
    run([*TWO, port, *command_line(flags, output_dir=tmp_path / "two")])
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert len(one) == len(two) == 2 and one[-1]["loss"] != 0.0
    for a, b in zip(one, two):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    assert (tmp_path / "two" / "adapter_model.safetensors").exists()


def test_two_processes_share_the_examples_of_a_supervised_step(settings, tmp_path, port):
    data = tmp_path / "d.jsonl"
    rows = (
        {"id": f"d{i}", "question": f"{i}?", "answer": "1", "response": [{"role": "model", "text": f"<answer>{i * 'a'}</answer>"}]}
        for i in range(8)
    )  # fmt: skip
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model_name_or_path", settings["model_name_or_path"], "--data", str(data), "--max_steps", "3",
             "--threads", "1", "--lr_scheduler_type", "constant", "--warmup_ratio", "0"]  # fmt: skip
    script, losses = str(ROOT / "train_sft.py"), {}
    for name, launcher, size in (("one", [sys.executable], "4"), ("two", [*TWO, port], "2")):
        run([*launcher, script, *flags, "--per_device_train_batch_size", size, "--output_dir", str(tmp_path / name)])
        losses[name] = [row["loss"] for row in metrics_of(tmp_path / name)]
    assert losses["one"] == pytest.approx(losses["two"], rel=1e-4) and losses["one"][0] != losses["one"][2]


def test_a_dead_process_ends_the_run_and_leaves_it_resumable(settings, tmp_path, port):
    command = [*TWO, port, *command_line(settings, max_steps=400, save_steps=1)]
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    folder = Path(settings["output_dir"])
    try:
        deadline = time.monotonic() + 200
        while not list(folder.glob("checkpoint-[0-9]*/trainer_state.json")) and time.monotonic() < deadline:
            time.sleep(0.2)
        workers = [pid for pid in children(started.pid) if rank_of(pid) == "1"]
        os.kill(workers[0], signal.SIGKILL)
        error = started.communicate(timeout=120)[1]
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode != 0 and ("lost another process" in error or "exitcode  : -9" in error)
    done = max(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*") if p.name.split("-")[1].isdigit())
    assert not (folder / "result.json").exists()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_steps": done + 1}))
    run([*TWO, port, *command_line(settings, max_steps=done + 1, save_steps=1)])
    assert [row["step"] for row in metrics_of(folder)] == list(range(1, done + 2))
    assert (folder / "result.json").exists()


def children(pid):
    """Processes under pid, itself left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            found += [int(stat.parent.name), *children(int(stat.parent.name))]
    return found


def rank_of(pid):
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((v.split(b"=")[1].decode() for v in environ if v.startswith(b"RANK=")), None)
