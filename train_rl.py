"""GRPO with tools, read top to bottom.

    python train_rl.py --model_name_or_path data/tiny --data Q.jsonl --index DIR --search_top_k 1 --output_dir out/rl

Each step, for `questions_per_step` questions:
1. rollout    G trajectories per question, with tools, from the current policy
2. score      log-probs and entropies of their tokens by the training forward itself, so the first ratio is exactly 1
3. reward     REWARDS[--reward] over each group
4. advantage  ADVANTAGES[--advantage] over each group, one value per token
5. update     clipped surrogate + optional k3 KL to the starting adapter, weights fixed over the whole optimizer step,
              and an entropy bonus by --entropy_regulariser, whose coefficient may be learned
Only model-written tokens (loss_mask 1) are trained on. `torchrun --nproc_per_node N train_rl.py …` shares the questions
of a step among N processes. Left out on purpose: critics, reward models, off-policy replay.
"""

import json
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Literal

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from bench import plan
from bench.plan import PlanArgs
from core import distributed
from core.args import RunArgs, arg, cli, require_positive
from core.checkpoint import resume, save_checkpoint
from core.conversation import NO_THINK, RolloutArgs, check_index, check_prompts, encode, open_tools
from core.model import (
    ModelArgs,
    OptimizerName,
    ScheduleName,
    adamw,
    add_reference,
    device,
    enable_checkpointing,
    load_policy,
    save_adapter,
    schedule,
)
from core.run import Run, shuffled, start_run
from core.segments import DeltaForm, Segment, mean_entropy
from core.trajectory import DataError, Trajectory, groups_of
from data.questions import load_questions
from data.world.facts import EASY_TERMS
from engines.branching import tokens_saved
from engines.merged import merged_copy, refresh
from eval.behaviour import void_turns
from eval.grader import score
from grpo.advantages import (
    ADVANTAGES,
    MIN_STD,
    AdvantageName,
    EntropyState,
    LossType,
    RegulariserName,
    first_entropy_state,
    next_entropy_state,
    trajectory_betas,
    with_targets,
)
from grpo.checks import check_trajectories, sampler_mismatch
from grpo.rewards import REWARDS, Indicator, RewardName
from grpo.update import micro_batches, reward_spread, update
from rollout import rollout

ENTROPY_REWARDS = ("entropy_sparse", "entropy_dense")
METHOD_FLAGS = (  # flag, the flag that decides whether it has an effect, with which of its values
    *((flag, "reward", ("et_agent",)) for flag in ("sigma_tool", "sigma_length", "sigma_schedule", "behaviour_gain")),
    *((flag, "reward", ENTROPY_REWARDS) for flag in ("segment", "delta_margin", "delta_form", "indicator")),
    ("dense_alpha", "reward", ("entropy_dense",)),
    ("call_penalty", "reward", ("calls_penalty",)),
    ("length_penalty", "reward", ("length_penalty",)),
    ("entropy_coef", "entropy_regulariser", ("constant",)),
    ("beta_short", "entropy_regulariser", ("decoupled",)),
    *((flag, "entropy_regulariser", ("adaptive", "decoupled")) for flag in ("beta_long", "beta_lr")),
)
CLIPPED = 0.2  # share of responses that were cut off above which a run says so
SHOWN = (  # beside the progress bar
    ("reward", "reward", ".3f"), ("calls", "tools/call_frequency", ".2f"), ("tokens", "completions/mean_length", ".0f"),
    ("entropy", "entropy", ".2f"),
)  # fmt: skip


@dataclass
class Args(RolloutArgs, ModelArgs, PlanArgs, RunArgs):
    """Flags of an RL run; the world's values are defaults, the papers' values stand in the help."""

    data: str = arg("", "questions: jsonl, verl parquet or dataset id (required)")
    task: Literal["auto", "math", "qa", "function"] = arg("auto", "task of all rows; auto = what the row says")
    limit: int = arg(0, "first N questions only, 0 = all")
    split: str = arg("train", "split, if --data is a dataset id")
    # --- reward and advantage
    reward: RewardName = arg("correct", "what is optimised")
    sigma_tool: float = arg(0.1, "et_agent: how steeply more calls than the group's mean cost (paper 0.1)")
    sigma_length: float = arg(0.1, "et_agent: the same for reasoning length (paper 0.1)")
    sigma_schedule: Literal["fixed", "linear"] = arg("fixed", "linear: both σ fall to 0 in the run (ET-Agent's code)")
    behaviour_gain: float = arg(1.0, "et_agent: g, 1 in the paper, 2 in its code")
    segment: Segment = arg("reasoning", "entropy_*: which tokens between two tool results make a segment")
    delta_margin: float = arg(0.0, "entropy_*: a call counts as reducing below −margin, in nats (paper 0)")
    delta_form: DeltaForm = arg("difference", "entropy_*: ΔH, or ΔH as a share of the entropy before the call")
    dense_alpha: float = arg(0.5, "entropy_dense: α, bonus of a reducing call (paper 0.5)")
    indicator: Indicator = arg("entropy", "entropy_*: where I_k comes from; the others are controls")
    call_penalty: float = arg(0.1, "calls_penalty: λ, price of a tool call")
    length_penalty: float = arg(0.5, "length_penalty: price of a response of --max_completion_length tokens")
    advantage: AdvantageName = arg("grpo", "how rewards become advantages; entropy_dense goes with its reward")
    # --- loss
    loss_type: LossType = arg("grpo", "how token weights are normalised")
    epsilon: float = arg(0.2, "clip: ratio >= 1 - epsilon")
    epsilon_high: float | None = arg(None, "clip: ratio <= 1 + epsilon_high; default = epsilon")
    beta: float = arg(0.0, "weight of the k3 KL to the adapter the run starts from")
    entropy_regulariser: RegulariserName = arg("none", "weight of each trajectory's mean token entropy in the loss")
    entropy_coef: float = arg(0.0, "constant: the coefficient (AutoTool's best 1e-1)")
    beta_short: float = arg(0.0, "decoupled: coefficient without thinking (AutoTool 0)")
    beta_long: float = arg(1e-2, "adaptive, decoupled: first value of the learned coefficient (AutoTool 1e-2)")
    entropy_target: Literal["absolute", "relative"] = arg("absolute", "targets in nats, or as multiples of step 0's")
    target_short: float | None = arg(None, "decoupled: the coefficient acts up to here; default 0.1 nats, 1.15 ×")
    target_long: float | None = arg(None, "adaptive, decoupled: default 0.2 nats (AutoTool), 1.15 ×")
    beta_lr: float = arg(2e-2, "adaptive, decoupled: step size of the learned coefficient")
    num_iterations: int = arg(1, "passes over each batch of trajectories")
    updates_per_batch: int = arg(1, "optimizer steps per pass (ET-Agent's code: 16)")
    skip_zero_variance: bool = arg(False, "leave groups without signal out of the normaliser too")
    mask_void_turns: bool = arg(False, "do not train on trajectories with a turn of neither call nor answer")
    mask_truncated_completions: bool = arg(False, "do not train on trajectories that ran out of tokens or calls")
    # --- batches and optimizer
    questions_per_step: int = arg(12, "questions per step (ET-Agent: 64)")
    per_device_train_batch_size: int = arg(32, "trajectories per micro-batch")
    gradient_accumulation_steps: int = arg(0, "micro-batches per optimizer step; 0 = as many as the step needs")
    max_tokens_per_micro_batch: int = arg(0, "micro-batches of so many tokens, padding included; 0 = by number")
    max_steps: int = arg(80, "rollout steps")
    learning_rate: float = arg(2e-3, "peak learning rate (ET-Agent, full parameters: 1e-6)")
    lr_scheduler_type: ScheduleName = arg("constant", "schedule of the learning rate, as in transformers")
    warmup_ratio: float = arg(0.0, "share of the steps with rising learning rate")
    optimizer: OptimizerName = arg("adamw", "adamw_8bit: states in 8 bits (bitsandbytes)")
    weight_decay: float = arg(0.0, "AdamW weight decay")
    max_grad_norm: float = arg(1.0, "gradient clipping, 0 = none")
    gradient_checkpointing: bool = arg(False, "recompute activations in the backward pass")
    rollout_dtype: Literal["policy", "float32", "bfloat16", "float16"] = arg(
        "policy", "sample from a merged copy of the policy in this precision (memory for a second model)"
    )
    entropy_band: list[float] = arg([0.01, 5.0], "warn when a step's mean token entropy in nats leaves LOW HIGH")
    # --- records
    save_steps: int = arg(20, "steps between checkpoints")
    save_total_limit: int = arg(2, "checkpoints kept, 0 = all")
    sample_steps: int = arg(10, "steps between sample dumps")
    resume_from_checkpoint: str = arg(
        "", "go on from another run's checkpoint: its step, optimizer and schedule (a fresh start: --model_name_or_path)"
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = arg("none", "tracker beside metrics.jsonl")

    def __post_init__(self):
        RunArgs.__post_init__(self)
        ModelArgs.__post_init__(self)
        RolloutArgs.__post_init__(self)
        if not self.data:
            raise ValueError("--data is required")
        for flag, plain in (("top_p", 1.0), ("top_k", 0), ("repetition_penalty", 1.0)):
            if getattr(self, flag) != plain:
                raise ValueError(f"--{flag} {getattr(self, flag)}: RL samples by temperature only, as it scores")
        if self.engine == "openai":
            raise ValueError("--engine openai: RL samples from the policy it trains; use hf or fast")
        if self.temperature <= 0:
            raise ValueError(f"--temperature {self.temperature}: RL needs a positive temperature")
        require_positive(self, "questions_per_step", "updates_per_batch", "num_iterations", "max_steps", "save_steps")
        require_positive(self, "per_device_train_batch_size", "sample_steps")
        for flag in ("epsilon", "warmup_ratio"):
            if getattr(self, flag) > 1:
                raise ValueError(f"--{flag} must be from 0 to 1, not {getattr(self, flag)}")
        if len(self.entropy_band) != 2 or not self.entropy_band[0] < self.entropy_band[1]:
            raise ValueError(f"--entropy_band takes LOW HIGH, not {self.entropy_band}")
        self.epsilon_high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        self.check_method()
        if self.questions_per_step % (self.updates_per_batch * distributed.count()):
            raise ValueError(
                f"--questions_per_step {self.questions_per_step} is not a multiple of --updates_per_batch "
                f"{self.updates_per_batch} × {distributed.count()} process(es)"
            )
        longest = self.max_prompt_length + self.max_completion_length
        if self.max_tokens_per_micro_batch:
            if self.max_tokens_per_micro_batch < longest:
                raise ValueError(
                    f"--max_tokens_per_micro_batch {self.max_tokens_per_micro_batch} is less than one trajectory may "
                    f"have: --max_prompt_length {self.max_prompt_length} + --max_completion_length "
                    f"{self.max_completion_length}"
                )
            if self.gradient_accumulation_steps:
                raise ValueError("--gradient_accumulation_steps does not go with --max_tokens_per_micro_batch")
            return
        per_update = self.questions_per_step * self.num_generations // (self.updates_per_batch * distributed.count())
        needed = math.ceil(per_update / self.per_device_train_batch_size)
        if self.gradient_accumulation_steps not in (0, needed):
            raise ValueError(
                f"{per_update} trajectories per optimizer step in micro-batches of --per_device_train_batch_size "
                f"{self.per_device_train_batch_size} need --gradient_accumulation_steps {needed}, "
                f"not {self.gradient_accumulation_steps}"
            )
        self.gradient_accumulation_steps = needed

    def check_method(self):
        """Flags of reward and entropy term that go together; sets the targets' defaults."""
        for flag, by, uses in METHOD_FLAGS:
            value, decides = getattr(self, flag), getattr(self, by)
            if decides not in uses and value != type(self).__dataclass_fields__[flag].default:
                raise ValueError(f"--{flag} {value} has no effect with --{by} {decides}, only with {' or '.join(uses)}")
        dense = self.advantage == "entropy_dense"
        if dense != (self.reward == "entropy_dense"):
            raise ValueError(f"--reward {self.reward} does not go with --advantage {self.advantage}")
        if self.reward in ("entropy_sparse", "entropy_dense") and self.temperature != 1:
            raise ValueError(f"--reward {self.reward} reads entropies at --temperature 1, not {self.temperature}")
        if dense and self.skip_zero_variance:
            raise ValueError("--skip_zero_variance looks at whole trajectories: not with --advantage entropy_dense")
        if self.skip_zero_variance and (self.beta > 0 or self.entropy_regulariser != "none"):
            raise ValueError(
                "--skip_zero_variance leaves out trajectories whose only signal is KL or entropy: not with "
                f"--beta {self.beta} and --entropy_regulariser {self.entropy_regulariser}"
            )
        if self.entropy_regulariser == "constant" and not self.entropy_coef:
            raise ValueError("--entropy_regulariser constant needs an --entropy_coef above 0")
        if not (0 <= self.beta_long <= 1 and self.beta_short >= 0 and self.beta_lr >= 0):
            raise ValueError(
                f"--beta_long {self.beta_long} must be in [0, 1], --beta_short {self.beta_short} and --beta_lr "
                f"{self.beta_lr} must not be negative"
            )
        short, long = (0.1, 0.2) if self.entropy_target == "absolute" else (1.15, 1.15)
        self.target_short = short if self.target_short is None else self.target_short
        self.target_long = long if self.target_long is None else self.target_long


def main(args: Args) -> dict:
    """Train; returns (and writes to result.json) the last step's metrics."""
    if args.dry_run:
        return dry_run(args)
    with distributed.processes():
        return train(args)


def train(args: Args) -> dict:
    """The run of this process; with torchrun each process has its share of every step's questions."""
    run = start_run(args, (args.data,))
    if run.finished:
        print(f"{args.output_dir}: finished before\n{json.dumps(run.finished, indent=1)}")
        return run.finished
    check_index(args)
    questions = load_questions(args.data, args.task, args.limit, args.split)
    check_enough(len(questions), args)
    model, tokenizer = load_policy(args)
    model.to(device())
    check_prompts(questions, tokenizer, args, model)
    if args.beta > 0 or args.indicator == "reference":
        add_reference(model)
    if args.gradient_checkpointing:
        enable_checkpointing(model)
    optimizer = adamw(model, args.optimizer, args.learning_rate, args.weight_decay)
    updates = args.max_steps * args.num_iterations * args.updates_per_batch
    scheduler = schedule(optimizer, args.lr_scheduler_type, args.warmup_ratio, updates)
    first, state = resume(
        run.dir, args.resume_from_checkpoint, model, optimizer, scheduler, args.max_steps, own="entropy_state"
    )
    run.forget_after(first)
    metrics = state.get("metrics", {})
    constraint = EntropyState(**state["entropy_state"]) if state else first_entropy_state(args)
    sampler = model if args.rollout_dtype == "policy" else merged_copy(model, args.rollout_dtype)
    opening = mode_tokens(tokenizer) if args.mode == "auto" else 0

    steps = range(first, args.max_steps)
    bar = tqdm(steps, initial=first, total=args.max_steps, desc="rl", unit="step", disable=distributed.rank() > 0)
    with open_tools(args) as toolbox:
        for step in bar:
            started = time.perf_counter()

            # ------------------------------------------------------------------------------------ examples
            indices = question_indices(len(questions), step, args)
            mine = [distributed.share(part) for part in split(indices, args.updates_per_batch)]
            examples = [questions[i] for part in mine for i in part]

            # ------------------------------------------------------------------------------------ rollout
            if sampler is not model:
                refresh(sampler, model)
            trajectories = rollout(sampler, tokenizer, examples, args, toolbox, (args.seed, step))
            parts = split(trajectories, args.updates_per_batch)
            rolled_out = time.perf_counter()

            # ------------------------------------------------------------------------------------ score
            model.train()
            batches = [micro_batches(part, model, tokenizer.pad_token_id, args) for part in parts]
            if args.check:
                check_trajectories(trajectories, tokenizer)

            # ------------------------------------------------------------------------------------ reward
            now = at_step(step, args)
            for group in groups_of(trajectories):
                correctness, formed = zip(*(score(t) for t in group))
                for t, terms in zip(group, REWARDS[args.reward](group, list(correctness), list(formed), now)):
                    t.rewards = terms

            # ------------------------------------------------------------------------------------ advantage
            for group in groups_of(trajectories):
                for t, values in zip(group, ADVANTAGES[args.advantage](group, [t.rewards for t in group], args)):
                    t.advantage = values
                    t.check()

            # ------------------------------------------------------------------------------------ update
            parts = [distributed.gather(part) for part in parts]
            everyone = [t for part in parts for t in part]
            constraint = with_targets(constraint, everyone, args)
            stats = []
            for batch, part in [*zip(batches, parts)] * args.num_iterations:
                betas = trajectory_betas(part, constraint, args)
                stats.append(update(model, optimizer, scheduler, batch, part, betas, args))
                if not stats[-1]["skipped_updates"]:
                    constraint = next_entropy_state(constraint, part, args)

            # ------------------------------------------------------------------------------------ log, save
            groups = groups_of(everyone)
            counted = rollout_metrics(groups)
            metrics = {
                **counted,
                **mode_metrics(everyone, opening),
                **(sampler_mismatch(everyone) if args.check else {}),
                "entropy_alarm": float(entropy_alarm(counted["entropy"], metrics, args)),
                "clipped_alarm": float(clipped_alarm(counted["completions/clipped_ratio"], metrics, args)),
                "beta_long": constraint.beta_long,
                **{name: fmean(s[name] for s in stats) for name in stats[0]},
                "learning_rate": scheduler.get_last_lr()[0],
                "time/rollout": rolled_out - started,
                "time/step": time.perf_counter() - started,
            }
            run.log(step + 1, metrics)
            bar.set_postfix({name: f"{metrics[key]:{digits}}" for name, key, digits in SHOWN})
            if distributed.rank() > 0:
                continue
            if step % args.sample_steps == 0:
                dump_samples(run, step + 1, groups[0])
            if (step + 1) % args.save_steps == 0 or step + 1 == args.max_steps:
                state = {"metrics": metrics, "entropy_state": asdict(constraint)}
                save_checkpoint(run.dir, step + 1, model, tokenizer, optimizer, scheduler, state, args.save_total_limit)
    result = {"steps": args.max_steps, **{k: v for k, v in metrics.items() if not k.startswith("time/")}}
    if distributed.rank() == 0:
        save_adapter(model, tokenizer, run.dir)
        run.finish(result)
        shown = ", ".join(f"{name} {result[key]:{digits}}" for name, key, digits in SHOWN)
        print(f"{args.output_dir}: {args.max_steps} steps, the last with {shown}; the adapter is there")
    return result


def check_enough(questions: int, args: Args) -> None:
    """Raise DataError if the data cannot fill one step."""
    if questions < args.questions_per_step:
        raise DataError(
            f"--data {args.data} holds {questions} questions, fewer than --questions_per_step {args.questions_per_step}"
        )


def dry_run(args: Args) -> dict:
    """The plan of this run (bench/plan.py); loads no weights and writes nothing."""
    questions, prompt, checked = plan.check_questions(args)
    if questions:
        check_enough(questions, args)
    per_step = args.questions_per_step * args.num_generations
    work = {
        "data": checked,
        "steps": args.max_steps,
        "optimizer steps": args.max_steps * args.num_iterations * args.updates_per_batch,
        "trajectories per step": per_step,
        "trajectories": args.max_steps * per_step,
        "tokens per step, at most": per_step * (prompt + args.max_completion_length),
    }
    return plan.dry_run(args, work, prompt, per_step)


def question_indices(n: int, step: int, args: Args) -> list[int]:
    """Indices of the step's questions: cuts of one seeded permutation per epoch, its remainder dropped."""
    epoch, cut = divmod(step, n // args.questions_per_step)
    order = shuffled(n, args.seed, "order", epoch)
    return order[cut * args.questions_per_step : (cut + 1) * args.questions_per_step]


def at_step(step: int, args: Args) -> Args:
    """The flags as they hold at a step (from 0): with the linear schedule σ_t = σ (T − t) / (T − 1) [PAPERS A4].

    t = step + 1 of T = max_steps, so that σ is whole at the first step and 0 at the last; a single step has it whole.
    """
    if args.sigma_schedule == "fixed" or args.max_steps == 1:
        return args
    left = (args.max_steps - 1 - step) / (args.max_steps - 1)
    return replace(args, sigma_tool=args.sigma_tool * left, sigma_length=args.sigma_length * left)


def split(items: list, parts: int) -> list[list]:
    """`parts` consecutive slices of equal length."""
    size = len(items) // parts
    return [items[i * size : (i + 1) * size] for i in range(parts)]


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
        "void_turns": fmean(void_turns(t) > 0 for t in flat),
        "time/tool_p50": seconds[len(seconds) // 2],
        "time/tool_p99": seconds[len(seconds) * 99 // 100],
        "rollout/tokens_saved": tokens_saved(flat),
    }


def mode_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens at the start of a response after which it is known whether its think block is empty."""
    return len(os.path.commonprefix([encode(tokenizer, NO_THINK), encode(tokenizer, "<think>\nso")])) + 1


def mode_metrics(trajectories: list[Trajectory], opening: int) -> dict[str, float]:
    """Thinking rate, mean H_i of either mode (absent where a step has none) and entropy of the mode decision, in nats.

    opening: tokens at the start of a response that decide the mode, 0 = it is forced. think_rate/long: of the world's
    running sums with more than EASY_TERMS terms, where the step has any.
    """
    metrics = {"think_rate": fmean(t.mode == "think" for t in trajectories)}
    if long := [t.mode == "think" for t in trajectories if t.meta.get("terms", 0) > EASY_TERMS]:
        metrics["think_rate/long"] = fmean(long)
    for mode in ("think", "no_think"):
        if entropies := [mean_entropy(t) for t in trajectories if t.mode == mode and t.completion_tokens]:
            metrics[f"entropy/{mode}"] = fmean(entropies)
    if opening:
        metrics["entropy/decision"] = fmean(sum(t.entropy[t.prompt_len :][:opening]) for t in trajectories)
    return metrics


def entropy_alarm(mean: float, before: dict, args: Args) -> bool:
    """Whether the step's token entropy is outside `--entropy_band`; says so when it was inside in the step before."""
    low, high = args.entropy_band
    text = f"token entropy {mean:.4f} nats is outside --entropy_band {low} {high}"
    return _say_once("entropy_alarm", not low <= mean <= high, before, text)


def clipped_alarm(share: float, before: dict, args: Args) -> bool:
    """Whether more than CLIPPED of a step's responses were cut off; says so when it was less in the step before."""
    text = (
        f"{share:.0%} of the responses ran out of --max_completion_length {args.max_completion_length} (tool results "
        f"included) or --max_tool_calling_iterations {args.max_tool_calling_iterations}: they count as malformed"
    )
    return _say_once("clipped_alarm", share > CLIPPED, before, text)


def _say_once(name: str, alarm: bool, before: dict, text: str) -> bool:  # before: the metrics of the step before
    if alarm and not before.get(name):
        tqdm.write(text)
    return alarm


def dump_samples(run: Run, step: int, group: list[Trajectory]) -> None:
    """Append one group to samples.jsonl: what the policy wrote and what it got for it."""
    with open(run.dir / "samples.jsonl", "a", encoding="utf-8") as out:
        for t in group:
            row = {"step": step, "id": t.question_id, "question": t.question, "gold": t.gold}
            row |= {"response": t.response_text, "rewards": t.rewards, "finish": t.finish}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    cli(main, Args)
