"""GRPO with tools, read top to bottom.

    python train_rl.py --model_name_or_path data/tiny --data Q.jsonl --index DIR --search_top_k 1 --output_dir out/rl

Each step, for `questions_per_step` questions:
1. rollout    G trajectories per question, with tools, from the policy as it is now
2. old logp   log-probs and entropies of their tokens by the training forward itself, so the first ratio is exactly 1
3. reward     REWARDS[--reward] over each group
4. advantage  ADVANTAGES[--advantage] over each group, one value per token
5. update     clipped surrogate + optional k3 KL to the starting adapter, tokens weighted over the whole optimizer step,
              and an entropy bonus by --entropy_regulariser, whose coefficient may be learned
Only model-written tokens (loss_mask 1) are trained on. `torchrun --nproc_per_node N train_rl.py …` shares the questions
of a step among N processes. Left out on purpose: value networks, reward models, off-policy replay. What a step logs:
grpo/metrics.py.
"""

import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import kernels
from core import distributed
from core.args import RunArgs, arg, cli, require_positive
from core.checkpoint import resume, save_checkpoint
from core.conversation import show_prompt
from core.model import (
    Batch,
    ModelArgs,
    OptimizerName,
    adamw,
    add_reference,
    collate,
    device,
    enable_checkpointing,
    head_weight,
    hidden_of_targets,
    keep_values,
    load_policy,
    packed,
    save_adapter,
    schedule,
    token_stats,
    use_reference,
)
from core.run import question_indices, start_run
from core.segments import Segment
from core.trajectory import DataError, Trajectory, groups_of
from data.questions import load_questions
from engines.args import SamplingArgs
from engines.fast import check_engine
from engines.merged import merged_copy, refresh
from engines.toolbox import check_index, open_tools
from engines.turns import check_prompts, start_draft
from eval.grader import grade
from grpo.advantages import ADVANTAGES, LossType, token_weights
from grpo.checks import check_trajectories, masked_tokens_have_no_gradient, sampler_mismatch
from grpo.constraint import (
    ENTROPY_REGULARISERS,
    EntropyState,
    first_entropy_state,
    next_entropy_state,
    trajectory_betas,
    with_targets,
)
from grpo.metrics import clipped_alarm, dump_samples, entropy_alarm, mode_metrics, mode_tokens, rollout_metrics
from grpo.rewards import REWARDS, Indicator
from rollout import ENGINES, rollout

ENTROPY_REWARDS = ("entropy_sparse", "entropy_dense")
METHOD_FLAGS = (  # a flag set where it has no effect is an error: flag, the flag that decides, with which values
    *((flag, "reward", ("et_agent",)) for flag in ("sigma_tool", "sigma_length", "sigma_schedule", "behaviour_gain")),
    *((flag, "reward", ENTROPY_REWARDS) for flag in ("segment", "delta_margin", "indicator")),
    ("dense_alpha", "reward", ("entropy_dense",)),
    ("call_penalty", "reward", ("calls_penalty",)),
    ("length_penalty", "reward", ("length_penalty",)),
    ("entropy_coef", "entropy_regulariser", ("constant",)),
    ("beta_short", "entropy_regulariser", ("decoupled",)),
    *((flag, "entropy_regulariser", ("adaptive", "decoupled")) for flag in ("beta_long", "beta_lr")),
)
SAMPLE_STEPS = 10  # steps between groups written to samples.jsonl
SHOWN = (  # beside the progress bar
    ("reward", "reward", ".3f"), ("calls", "tools/call_frequency", ".2f"), ("tokens", "completions/mean_length", ".0f"),
    ("entropy", "entropy", ".2f"),
)  # fmt: skip


@dataclass
class Args(SamplingArgs, ModelArgs, RunArgs):
    """Flags of an RL run; the world's values are defaults, the papers' values stand in the help."""

    data: str = arg("", "questions: jsonl, verl parquet or dataset id (required)")
    task: Literal["auto", "math", "qa", "function"] = arg("auto", "task of all rows; auto = what the row says")
    limit: int = arg(0, "first N questions only, 0 = all")
    split: str = arg("train", "split, if --data is a dataset id")
    engine: Literal[tuple(name for name in ENGINES if name != "openai")] = arg(
        "hf", "sampler: hf = generate, the reference; fast = engines/fast.py"
    )
    # --- reward and advantage
    reward: Literal[tuple(REWARDS)] = arg("correct", "what is optimised")
    sigma_tool: float = arg(0.1, "et_agent: how steeply more calls than the group's mean cost (paper 0.1)")
    sigma_length: float = arg(0.1, "et_agent: the same for reasoning length (paper 0.1)")
    sigma_schedule: Literal["fixed", "linear"] = arg("fixed", "linear: both σ fall to 0 in the run (ET-Agent's code)")
    behaviour_gain: float = arg(1.0, "et_agent: g, 1 in the paper, 2 in its code")
    segment: Segment = arg("reasoning", "entropy_*: which tokens between two tool results make a segment")
    delta_margin: float = arg(0.0, "entropy_*: a call counts as reducing below −margin, in nats (paper 0)")
    dense_alpha: float = arg(0.5, "entropy_dense: α, bonus of a reducing call (paper 0.5)")
    indicator: Indicator = arg("entropy", "entropy_*: where I_k comes from; the others are controls")
    call_penalty: float = arg(0.1, "calls_penalty: λ, price of a tool call")
    length_penalty: float = arg(0.5, "length_penalty: price of a response of --max_completion_length tokens")
    advantage: Literal[tuple(ADVANTAGES)] = arg(
        "grpo", "how rewards become advantages; entropy_dense goes with its reward"
    )
    # --- loss
    loss_type: LossType = arg("grpo", "how token weights are normalised")
    epsilon: float = arg(0.2, "clip: ratio >= 1 - epsilon")
    epsilon_high: float | None = arg(None, "clip: ratio <= 1 + epsilon_high; default = epsilon")
    dual_clip: float = arg(0.0, "ratio from which a bad token's loss grows no more (ET-Agent's code: 3); 0 = off")
    beta: float = arg(0.0, "weight of the k3 KL to the adapter the run starts from")
    entropy_regulariser: Literal[tuple(ENTROPY_REGULARISERS)] = arg(
        "none", "weight of each trajectory's mean token entropy in the loss"
    )
    entropy_coef: float = arg(0.0, "constant: the coefficient (AutoTool's best 1e-1)")
    beta_short: float = arg(0.0, "decoupled: coefficient without thinking (AutoTool 0)")
    beta_long: float = arg(1e-2, "adaptive, decoupled: first value of the learned coefficient (AutoTool 1e-2)")
    entropy_target: Literal["absolute", "relative"] = arg("absolute", "targets in nats, or as multiples of step 0's")
    target_short: float | None = arg(None, "decoupled: the coefficient acts up to here; default 0.1 nats, 1.15 ×")
    target_long: float | None = arg(None, "adaptive, decoupled: default 0.2 nats (AutoTool), 1.15 ×")
    beta_lr: float = arg(2e-2, "adaptive, decoupled: step size of the learned coefficient")
    num_iterations: int = arg(1, "passes over each batch of trajectories")
    updates_per_batch: int = arg(1, "optimizer steps per pass (ET-Agent's code: 16)")
    mask_truncated_completions: bool = arg(False, "do not train on trajectories that ran out of tokens or calls")
    # --- batches and optimizer
    questions_per_step: int = arg(12, "questions per step (ET-Agent: 64)")
    per_device_train_batch_size: int = arg(32, "trajectories per micro-batch")
    max_tokens_per_micro_batch: int = arg(0, "micro-batches of so many tokens, padding included; 0 = by number")
    max_steps: int = arg(80, "rollout steps")
    learning_rate: float = arg(2e-3, "learning rate (ET-Agent, full parameters: 1e-6)")
    optimizer: OptimizerName = arg("adamw", "adamw_8bit: states in 8 bits (bitsandbytes)")
    max_grad_norm: float = arg(1.0, "gradient clipping, 0 = none")
    gradient_checkpointing: bool = arg(False, "recompute activations in the backward pass")
    rollout_dtype: Literal["policy", "float32", "bfloat16", "float16"] = arg(
        "policy", "sample from a merged copy of the policy in this precision (memory for a second model)"
    )
    # --- records
    save_steps: int = arg(20, "steps between checkpoints")
    save_total_limit: int = arg(2, "checkpoints kept, 0 = all")
    report_to: Literal["none", "wandb"] = arg("none", "tracker beside metrics.jsonl")

    def __post_init__(self):
        RunArgs.__post_init__(self)
        ModelArgs.__post_init__(self)
        SamplingArgs.__post_init__(self)
        if not self.data:
            raise ValueError("--data is required")
        if self.temperature <= 0:
            raise ValueError(f"--temperature {self.temperature}: RL needs a positive temperature")
        require_positive(self, "questions_per_step", "updates_per_batch", "num_iterations", "max_steps", "save_steps")
        require_positive(self, "per_device_train_batch_size")
        if self.epsilon > 1:
            raise ValueError(f"--epsilon must be from 0 to 1, not {self.epsilon}")
        self.epsilon_high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.dual_clip and self.dual_clip <= 1 + self.epsilon_high:
            raise ValueError(f"--dual_clip {self.dual_clip} must be 0 or above 1 + --epsilon_high {self.epsilon_high}")
        self.check_method()
        if self.questions_per_step % (self.updates_per_batch * distributed.count()):
            raise ValueError(
                f"--questions_per_step {self.questions_per_step} is not a multiple of --updates_per_batch "
                f"{self.updates_per_batch} × {distributed.count()} process(es)"
            )
        longest = self.max_prompt_length + self.max_completion_length
        if 0 < self.max_tokens_per_micro_batch < longest:
            raise ValueError(
                f"--max_tokens_per_micro_batch {self.max_tokens_per_micro_batch} is less than one trajectory may have: "
                f"--max_prompt_length {self.max_prompt_length} + --max_completion_length {self.max_completion_length}"
            )

    def check_method(self):
        """Flags of reward and entropy term that go together; sets the targets' defaults."""
        for flag, by, uses in METHOD_FLAGS:
            value, decides = getattr(self, flag), getattr(self, by)
            if decides not in uses and value != type(self).__dataclass_fields__[flag].default:
                raise ValueError(f"--{flag} {value} has no effect with --{by} {decides}, only with {' or '.join(uses)}")
        if (self.advantage == "entropy_dense") != (self.reward == "entropy_dense"):
            raise ValueError(f"--reward {self.reward} does not go with --advantage {self.advantage}")
        if self.reward in ENTROPY_REWARDS and self.temperature != 1:
            raise ValueError(f"--reward {self.reward} reads entropies at --temperature 1, not {self.temperature}")
        if self.entropy_regulariser == "constant" and not self.entropy_coef:
            raise ValueError("--entropy_regulariser constant needs an --entropy_coef above 0")
        if not 0 <= self.beta_long <= 1:
            raise ValueError(f"--beta_long {self.beta_long} must be from 0 to 1")
        short, long = (0.1, 0.2) if self.entropy_target == "absolute" else (1.15, 1.15)
        self.target_short = short if self.target_short is None else self.target_short
        self.target_long = long if self.target_long is None else self.target_long


def main(args: Args) -> dict:
    """Train; returns (and writes to result.json) the last step's metrics."""
    with distributed.processes():
        return train(args)


def train(args: Args) -> dict:
    """The run of this process; with torchrun each process has its share of every step's questions."""
    run = start_run(args, (args.data,))
    if run.finished:
        print(f"{args.output_dir}: finished before\n{json.dumps(run.finished, indent=1)}")
        return run.finished
    check_index(args.index)
    questions = load_questions(args.data, args.task, args.limit, args.split)
    if len(questions) < args.questions_per_step:
        raise DataError(
            f"--data {args.data} holds {len(questions)} questions, fewer than --questions_per_step "
            f"{args.questions_per_step}"
        )
    model, tokenizer = load_policy(args)
    model.to(device())
    check_engine(model, tokenizer, args)
    check_prompts(questions, tokenizer, args, model)
    show_prompt(questions[0], tokenizer, args.dialect)
    if args.beta > 0 or args.indicator == "reference":
        add_reference(model)
    if args.gradient_checkpointing:
        enable_checkpointing(model)
    optimizer = adamw(model, args.optimizer, args.learning_rate)
    scheduler = schedule(optimizer, "constant", 0.0, args.max_steps)
    first, state = resume(run.dir, model, optimizer, scheduler)
    run.forget_after(first)
    metrics = state.get("metrics", {})
    constraint = EntropyState(**state["entropy_state"]) if state else first_entropy_state(args)
    sampler = model if args.rollout_dtype == "policy" else merged_copy(model, args.rollout_dtype)
    # what the template has written of an answer decides after how many tokens its mode is known
    written = "".join(piece for *_, piece in start_draft(questions[0], 0, tokenizer, args, ()).segments)
    opening = mode_tokens(tokenizer, written) if args.mode == "auto" else 0

    steps = range(first, args.max_steps)
    bar = tqdm(steps, initial=first, total=args.max_steps, desc="rl", unit="step", disable=distributed.rank() > 0)
    with open_tools(args) as toolbox:
        for step in bar:
            started = time.perf_counter()

            # ------------------------------------------------------------------------------------ questions
            indices = question_indices(len(questions), args.questions_per_step, step, args.seed)
            # the questions of each optimizer step; this process has its share of them
            mine = [distributed.share(part) for part in split(indices, args.updates_per_batch)]
            examples = [questions[i] for part in mine for i in part]
            now = at_step(step, args)  # the flags, σ as the schedule has it at this step

            # ------------------------------------------------------------------------------------ rollout
            # G answers per question, with tools, from the policy as it is now
            if sampler is not model:
                refresh(sampler, model)
            trajectories = rollout(sampler, tokenizer, examples, args, toolbox, (args.seed, step))
            parts = split(trajectories, args.updates_per_batch)
            rolled_out = time.perf_counter()

            # ------------------------------------------------------------------------------------ old log-probs
            # We do not trust the sampler's own: its arithmetic differs slightly from training's. A second forward pass
            # costs time, but the first ratio of the update is then exactly 1. It fills t.entropy, which rewards read.
            model.train()
            batches = [micro_batches(part, model, tokenizer.pad_token_id, args) for part in parts]
            if args.check:
                check_trajectories(trajectories, tokenizer)

            # ------------------------------------------------------------------------------------ reward, advantage
            # Rewards need the whole group, because ET-Agent compares each answer with its siblings. An advantage is one
            # number per token, 0 on prompts and tool results, so that they never train; a group whose rewards are all
            # equal gets 0 everywhere: it has nothing to teach.
            for group in groups_of(trajectories):
                correctness, formed = zip(*(grade(t, args.format) for t in group))
                rewards = REWARDS[args.reward](group, list(correctness), list(formed), now)
                for t, terms, values in zip(group, rewards, ADVANTAGES[args.advantage](group, rewards, args)):
                    t.rewards, t.advantage = terms, values
                    t.check()

            # ------------------------------------------------------------------------------------ update
            # of all processes: token weights and metrics are over the whole step
            parts = [distributed.gather(part) for part in parts]
            everyone = [t for part in parts for t in part]
            groups = groups_of(everyone)
            constraint = with_targets(constraint, everyone, args)
            stats = []
            for batch, part in [*zip(batches, parts)] * args.num_iterations:  # one optimizer step each
                betas = trajectory_betas(part, constraint, args)
                stats.append(update(model, optimizer, scheduler, batch, part, betas, args))
                if not stats[-1]["skipped_updates"]:
                    constraint = next_entropy_state(constraint, part, args)

            # ------------------------------------------------------------------------------------ log, save
            counted = rollout_metrics(groups)
            cut_off = counted["completions/clipped_ratio"]
            limits = (args.max_completion_length, args.max_tool_calling_iterations)
            metrics = {
                **counted,
                **mode_metrics(everyone, opening),
                **(sampler_mismatch(everyone) if args.check else {}),
                "entropy_alarm": float(entropy_alarm(counted["entropy"], metrics)),
                "clipped_alarm": float(clipped_alarm(cut_off, metrics, *limits)),
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
            if step % SAMPLE_STEPS == 0:
                dump_samples(run.dir, step + 1, groups[0])
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


# -------------------------------------------------------------------------------------------- one optimizer step


class MicroBatch(NamedTuple):
    """Trajectories that share a forward pass, the same in the pass for the old log-probs and in every update.

    old_logp, ref_logp: (N,) over the batch's trained tokens, in the order of `hidden_of_targets`.
    """

    trajectories: list[Trajectory]
    batch: Batch
    old_logp: Tensor
    ref_logp: Tensor | None


@torch.no_grad()
def micro_batches(part: list[Trajectory], model: torch.nn.Module, pad_id: int, args: Args) -> list[MicroBatch]:
    """Pack one update's trajectories, shortest first, and take their old log-probs and entropies (T = temperature).

    Fills `entropy` of every trajectory, `ref_entropy` for --indicator reference and `old_logp` with --check.
    """
    for t in part:
        if not t.sampled:
            raise ValueError(f"trajectory {t.question_id}/{t.sample_idx} was not sampled; RL trains on samples only")
    result = []
    for rows in packed(part, args.per_device_train_batch_size, args.max_tokens_per_micro_batch):
        batch = collate(rows, pad_id, device())
        logp, entropy = token_stats(model, batch, args.temperature)  # (B, T)
        keep_values(rows, "entropy", entropy)
        if args.check:
            keep_values(rows, "old_logp", logp)
        ref_logp = None
        if args.beta > 0 or args.indicator == "reference":
            with use_reference(model):
                ref, entropy = token_stats(model, batch, args.temperature)
            ref_logp = ref[batch.loss_mask]
            if args.indicator == "reference":
                keep_values(rows, "ref_entropy", entropy)
        result.append(MicroBatch(rows, batch, logp[batch.loss_mask], ref_logp if args.beta > 0 else None))
    return result


def update(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    part: list[MicroBatch],
    everyone: list[Trajectory],
    betas: list[float],
    args: Args,
) -> dict[str, float]:
    """One optimizer step, and one of the learning rate's schedule; a non-finite loss or gradient skips both.

    part: this process's micro-batches. everyone: the update's trajectories of all processes, over which the token
    weights are normalised; betas: their entropy coefficients β_i [2603.13348, PAPERS B4], in the same order.
    """
    trains = [t.finish == "eos" or not args.mask_truncated_completions for t in everyone]
    lengths = [t.completion_tokens if kept else 0 for t, kept in zip(everyone, trains)]
    weights = token_weights(lengths, args.loss_type, args.max_completion_length)
    # The kernel multiplies its entropy term by the token weight; we want mean_i β_i H_i under every loss type.
    bonuses = [beta / (len(everyone) * n * w) if n else 0.0 for beta, n, w in zip(betas, lengths, weights, strict=True)]
    row_terms = {(t.question_id, t.sample_idx): terms for t, *terms in zip(everyone, weights, bonuses)}
    tokens = max(sum(t.completion_tokens for t in everyone), 1)
    totals = {"loss": 0.0, "kl": 0.0, "clip_ratio/low_mean": 0.0, "clip_ratio/high_mean": 0.0}
    for mb in part:
        per_row = [row_terms[t.question_id, t.sample_idx] for t in mb.trajectories]
        if args.beta == 0 and not any(w and (b or any(t.advantage)) for t, (w, b) in zip(mb.trajectories, per_row)):
            continue  # no advantage, no bonus, no KL: no gradient
        with masked_tokens_have_no_gradient(model, mb.batch) if args.check else nullcontext():
            loss, stats = policy_loss(model, mb, per_row, args)
        loss.backward()
        share = sum(t.completion_tokens for t, (weight, _) in zip(mb.trajectories, per_row) if weight) / tokens
        totals["loss"] += loss.item()
        totals["kl"] += stats["kl"].sum().item() / tokens
        totals["clip_ratio/low_mean"] += float(stats["clip_low_frac"]) * share
        totals["clip_ratio/high_mean"] += float(stats["clip_high_frac"]) * share
    trained = [p for p in model.parameters() if p.requires_grad]
    distributed.sum_gradients(trained)
    totals = distributed.sum_values(totals)
    norm = torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm or math.inf).item()
    finite = math.isfinite(totals["loss"]) and math.isfinite(norm)
    if finite:
        optimizer.step()
        scheduler.step()
    else:
        tqdm.write(f"skipped an update: loss {totals['loss']}, gradient norm {norm}")
        totals = {name: 0.0 for name in totals}
    optimizer.zero_grad()
    return {**totals, "grad_norm": norm if finite else 0.0, "skipped_updates": float(not finite)}


def policy_loss(model: torch.nn.Module, mb: MicroBatch, row_terms: list, args: Args) -> tuple[Tensor, dict]:
    """The micro-batch's share of the step's loss, and its token statistics (maths: kernels/policy_loss.py).

    row_terms: (token weight, entropy coefficient) of each trajectory.
    """
    mask = mb.batch.loss_mask  # (B, T); indexing by it gives (N,), in the order of hidden and targets
    hidden, targets = hidden_of_targets(model, mb.batch)  # (N, H), (N,)
    terms = torch.tensor(row_terms, device=mask.device)[:, :, None].expand(-1, -1, mask.shape[1])  # (B, 2, T)
    weight, bonus = terms.unbind(1)  # (B, T)
    advantage = torch.tensor([a for t in mb.trajectories for a, m in zip(t.advantage, t.loss_mask) if m])  # (N,)
    return kernels.linear_policy_loss(
        hidden,
        head_weight(model),
        targets,
        token_weight=weight[mask],
        advantage=advantage.to(mask.device),
        old_logp=mb.old_logp,
        ref_logp=mb.ref_logp,
        clip_low=args.epsilon,
        clip_high=args.epsilon_high,
        kl_coef=args.beta,
        dual_clip=args.dual_clip,
        entropy_coef=bonus[mask],
        temperature=args.temperature,
        check=args.check,
    )


if __name__ == "__main__":
    cli(main, Args)
