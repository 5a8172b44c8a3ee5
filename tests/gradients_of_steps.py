"""Gradients of five GRPO steps, each from a given adapter and given trajectories; for test_distributed.py.

python tests/gradients_of_steps.py ARGS.json OUT.pt        (or under torchrun)
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train_rl
from core import distributed
from core.model import load_policy
from core.trajectory import load_trajectories


class NoStep(torch.optim.SGD):
    """Keeps the gradients instead of stepping."""

    def step(self):
        self.seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])


def main(settings, out):
    args = train_rl.Args(**json.loads(Path(settings).read_text()))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokenizer = load_policy(args)
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = NoStep(trained.values(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    folder, steps = Path(args.data).parent, []
    for step in range(5):
        with torch.no_grad():
            for p, value in zip(trained.values(), torch.load(folder / f"adapter-{step}.pt")):
                p.copy_(value)
        stored = load_trajectories(folder / f"rollouts-{step}.jsonl")
        parts = [distributed.share(part) for part in train_rl.split(stored, args.updates_per_batch)]
        batches = [train_rl.micro_batches(part, model, tokenizer.pad_token_id, args) for part in parts]
        optimizer.seen, stats = [], []
        for batch, part in zip(batches, [distributed.gather(part) for part in parts]):
            stats.append(train_rl.update(model, optimizer, schedule, batch, part, [0.01] * len(part), args))
        steps.append((optimizer.seen, stats))
    if distributed.rank() == 0:
        torch.save(steps, out)


if __name__ == "__main__":
    with distributed.processes():
        main(*sys.argv[1:])
