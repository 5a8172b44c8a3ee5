"""What a step of RL logs to metrics.jsonl, under TRL's names, and the two alarms that a run gives.

`reward`, `reward_std` (mean over groups of the sample std), `rewards/NAME/mean`, `completions/mean_length`
(model-written tokens), `completions/clipped_ratio` (ran out of tokens or calls), `entropy` (nats per token, full
vocabulary, sampling temperature), `kl` (k3 to the starting adapter, per token), `clip_ratio/*` (share of model-written
tokens whose gradient the clip removed), `frac_reward_zero_std`, `tools/call_frequency` (calls per trajectory),
`tools/failure_frequency` (share of calls), `rollout/tokens_saved` (share of model-written tokens that branching
inherited), `think_rate`, `beta_long`.
"""

import json
import os
from pathlib import Path
from statistics import fmean, stdev

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from core.conversation import NO_THINK, behind_opening, encode
from core.segments import mean_entropy
from core.trajectory import Trajectory
from grpo.advantages import MIN_STD

CLIPPED = 0.2  # share of responses that were cut off above which a run says so
ENTROPY_BAND = (0.01, 5.0)  # mean token entropy of a step in nats; outside of it a run says so


def reward_spread(group: list[Trajectory]) -> float:
    """Sample standard deviation of a group's total rewards."""
    return stdev(t.rewards["total"] for t in group) if len(group) > 1 else 0.0


def rollout_metrics(groups: list[list[Trajectory]]) -> dict[str, float]:
    """TRL's metric names: means over the step's trajectories (rewards, tokens, entropy in nats) and calls.

    A term that only some trajectories have is averaged over those.
    """
    flat = [t for group in groups for t in group]
    calls = [c for t in flat for c in t.tool_calls]
    seconds = sorted(c.seconds for c in calls) or [0.0]
    terms: dict[str, list[float]] = {}
    for t in flat:
        for name, value in t.rewards.items():
            terms.setdefault(name, []).append(value)
    tokens = sum(t.completion_tokens for t in flat)
    return {
        "reward": fmean(terms.pop("total")),
        "reward_std": fmean(reward_spread(group) for group in groups),
        **{f"rewards/{name}/mean": fmean(values) for name, values in sorted(terms.items())},
        "completions/mean_length": tokens / len(flat),
        "completions/clipped_ratio": fmean(t.finish != "eos" for t in flat),
        "entropy": sum(sum(t.entropy) for t in flat) / max(tokens, 1),
        "frac_reward_zero_std": fmean(reward_spread(group) < MIN_STD for group in groups),
        "tools/call_frequency": fmean(t.n_calls for t in flat),
        "tools/failure_frequency": sum(not c.ok for c in calls) / max(len(calls), 1),
        "num_turns/mean": fmean(1 + sum(s.kind == "tool_result" for s in t.spans) for t in flat),
        "time/tool_p50": seconds[len(seconds) // 2],
        "time/tool_p99": seconds[len(seconds) * 99 // 100],
        "rollout/tokens_saved": tokens_saved(flat),
    }


def tokens_saved(trajectories: list[Trajectory]) -> float:
    """Share of the model-written tokens that were inherited from a parent instead of sampled."""
    inherited = sum(sum(t.loss_mask[: t.meta.get("inherited", 0)]) for t in trajectories)
    return inherited / max(sum(t.completion_tokens for t in trajectories), 1)


def mode_tokens(tokenizer: PreTrainedTokenizerBase, written: str = "") -> int:
    """Tokens at the start of a response after which it is known whether its think block is empty.

    written: the opening that the chat template gives every response; 0 if that settles it.
    """
    if "</think>" in written:
        return 0
    ways = [encode(tokenizer, behind_opening(text, written)) for text in (NO_THINK, "<think>\nso")]
    return len(encode(tokenizer, written)) + len(os.path.commonprefix(ways)) + 1


def mode_metrics(trajectories: list[Trajectory], opening: int) -> dict[str, float]:
    """Thinking rate, mean H_i of either mode (absent where a step has none) and entropy of the mode decision, in nats.

    opening: tokens at the start of a response that decide the mode, 0 = it is forced. think_rate/LEVEL: of the
    questions whose rows name that `level`, such as the world's short and long sums.
    """
    metrics = {"think_rate": fmean(t.mode == "think" for t in trajectories)}
    levels: dict[str, list[bool]] = {}
    for t in trajectories:
        if "level" in t.meta:
            levels.setdefault(f"think_rate/{t.meta['level']}", []).append(t.mode == "think")
    metrics |= {name: fmean(thought) for name, thought in sorted(levels.items())}
    for mode in ("think", "no_think"):
        if entropies := [mean_entropy(t) for t in trajectories if t.mode == mode and t.completion_tokens]:
            metrics[f"entropy/{mode}"] = fmean(entropies)
    if opening:
        metrics["entropy/decision"] = fmean(sum(t.entropy[t.prompt_len :][:opening]) for t in trajectories)
    return metrics


def entropy_alarm(mean: float, before: dict) -> bool:
    """Whether the step's token entropy is outside ENTROPY_BAND; says so when it was inside in the step before."""
    low, high = ENTROPY_BAND
    text = f"token entropy {mean:.4f} nats is outside {low} to {high}: the policy has collapsed or come apart"
    return _say_once("entropy_alarm", not low <= mean <= high, before, text)


def clipped_alarm(share: float, before: dict, max_completion_length: int, max_calls: int) -> bool:
    """Whether more than CLIPPED of a step's responses were cut off; says so when it was less in the step before."""
    text = (
        f"{share:.0%} of the responses ran out of --max_completion_length {max_completion_length} (tool results "
        f"included) or --max_tool_calling_iterations {max_calls}: they count as malformed"
    )
    return _say_once("clipped_alarm", share > CLIPPED, before, text)


def _say_once(name: str, alarm: bool, before: dict, text: str) -> bool:  # before: the metrics of the step before
    if alarm and not before.get(name):
        tqdm.write(text)
    return alarm


def dump_samples(folder: Path, step: int, group: list[Trajectory]) -> None:
    """Append one group to samples.jsonl: what the policy wrote and what it got for it."""
    with open(folder / "samples.jsonl", "a", encoding="utf-8") as out:
        for t in group:
            row = {"step": step, "id": t.question_id, "question": t.question, "gold": t.gold}
            row |= {"response": t.response_text, "rewards": t.rewards, "finish": t.finish}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
