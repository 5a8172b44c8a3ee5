"""Draws a map of what models do: where the trajectories of several training stages lie [2601.06860, fig. 7; PAPERS A6].

    python -m experiments.action_space --model_name_or_path data/tiny --trajectories base=b.jsonl rl=r.jsonl --output D

One model embeds the trajectories of all stages: the mean of its last hidden states over the model-written tokens. The
plane is that of the two largest principal components of all embeddings together. Writes action_space.json (coordinates,
spread per stage, share of the variance in the plane) and action_space.png, one panel per stage on equal axes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from core.args import arg, cli
from core.model import ModelArgs, causal_lm, collate, device, load_policy, sampling_mode
from core.run import table, write_text
from core.trajectory import DataError, Trajectory, check_tokenizer, load_trajectories
from experiments.figures import pyplot, save


@dataclass
class Args(ModelArgs):
    """Flags of the map."""

    trajectories: list[str] = arg([], "NAME=FILE for each stage, trajectory files of one tokenizer (required)")
    output: str = arg("", "folder for action_space.json and action_space.png (required)")
    limit: int = arg(500, "first N trajectories of each stage, 0 = all")

    def __post_init__(self):
        super().__post_init__()
        if not self.trajectories or not self.output:
            raise ValueError("--trajectories and --output are required")
        names = [entry.partition("=")[0] for entry in self.trajectories]
        if any("=" not in entry for entry in self.trajectories) or len(set(names)) < len(names):
            raise ValueError(f"--trajectories {' '.join(self.trajectories)}: must be NAME=FILE with different names")


def main(args: Args) -> dict:
    """Embed, project, draw; returns the content of action_space.json."""
    stages: dict[str, list[Trajectory]] = {}
    for name, _, path in (entry.partition("=") for entry in args.trajectories):
        stages[name] = load_trajectories(path)[: args.limit or None]
        if not stages[name] or not all(t.completion_tokens for t in stages[name]):
            raise DataError(f"--trajectories {name}={path}: a trajectory without model-written tokens, or none at all")
    model, tokenizer = load_policy(args, trainable=False)
    for name, members in stages.items():
        check_tokenizer(members, tokenizer, f"--trajectories {name}")
    model.to(device())
    embedded = {name: embeddings(ts, model, tokenizer) for name, ts in stages.items()}
    points, explained = principal_plane(torch.cat(list(embedded.values())))
    rows = {}
    for (name, ts), plane in zip(stages.items(), points.split([len(ts) for ts in stages.values()])):
        known = [{"id": t.question_id, "sample_idx": t.sample_idx, "family": t.family, "calls": t.n_calls} for t in ts]
        rows[name] = [row | {"x": x, "y": y} for row, (x, y) in zip(known, plane.tolist())]
    wide = {name: spread(e) for name, e in embedded.items()}
    result = {"model": args.model_name_or_path, "explained": explained, "spread": wide, "stages": rows}
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "action_space.json", json.dumps(result, indent=1) + "\n")
    draw(folder / "action_space.png", rows)
    print(table(["stage", "n", "spread"], [[name, len(stages[name]), s] for name, s in wide.items()]))
    print(f"variance in the plane: {explained[0]:.2f} + {explained[1]:.2f}")
    return result


def embeddings(
    trajectories: list[Trajectory], model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32
) -> Tensor:
    """(N, H) float32: mean of the last hidden states over each trajectory's tokens with loss_mask 1."""
    rows, decoder = [], causal_lm(model).base_model
    with torch.no_grad(), sampling_mode(model):
        for at in tqdm(range(0, len(trajectories), batch_size), desc="embed", unit="batch"):
            batch = collate(trajectories[at : at + batch_size], tokenizer.pad_token_id, device())
            out = decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            mask = batch.loss_mask[:, :, None].float()  # (B, T, 1)
            rows.append(((out.last_hidden_state.float() * mask).sum(dim=1) / mask.sum(dim=1)).cpu())  # (B, H)
    return torch.cat(rows)


def principal_plane(points: Tensor) -> tuple[Tensor, list[float]]:
    """(N, H) -> (N, 2) coordinates on the first two principal components, and the share of the variance of each.

    Each component points to the side of its largest weight, so that the map does not flip between runs. Dimensions that
    the points do not span (N or H of 1 among them) are 0.
    """
    centred = pad((points - points.mean(dim=0)).double(), (0, 1, 0, 1))  # row and column of 0: two components at least
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)  # (K,), (K, H + 1)
    directions = directions[:2]
    signs = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()  # (2, 1)
    shares = (sizes**2 / (sizes**2).sum().clamp(min=1e-30))[:2].tolist()
    return centred[:-1] @ (directions * signs).T, shares


def spread(points: Tensor) -> float:
    """Root of the mean squared distance of (N, H) points to their mean: how wide a stage's actions are."""
    return (points - points.mean(dim=0)).pow(2).sum(dim=1).mean().sqrt().item()


def draw(path: Path, stages: dict[str, list[dict]]) -> None:
    """One panel per stage: its trajectories by family, in grey those of the other stages."""
    families = sorted({row["family"] for rows in stages.values() for row in rows})
    size = dict(figsize=(3.6 * len(stages) + 1, 3.6), sharex=True, sharey=True, squeeze=False)
    figure, axes = pyplot().subplots(1, len(stages), **size)
    for axis, (name, rows) in zip(axes[0], stages.items()):
        others = [row for other, found in stages.items() if other != name for row in found]
        axis.scatter([row["x"] for row in others], [row["y"] for row in others], s=4, color="0.88")
        for k, family in enumerate(families):
            x, y = ([row[at] for row in rows if row["family"] == family] for at in ("x", "y"))
            axis.scatter(x, y, s=6, color=f"C{k}", label=family)
        axis.set_title(name, fontsize=10)
    axes[0][-1].legend(frameon=False, fontsize=7, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


if __name__ == "__main__":
    cli(main, Args)
